r"""Gives LaTeX one spelling: `\dfrac12` and `\frac{1}{2}` become the same text of TOKENs."""

import re

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNITS = {"$": '"dollars"', "€": '"euros"', "£": '"pounds"', "¥": '"yen"', "°": '"degrees"'}
LETTERS = {"m": "met", "s": "sec", "h": ("ho", "hr"), "g": "gram", "l": "lit"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
TOKEN = re.compile(  # the signs in UNITS are no tokens: they are skipped
    r'"[^"]*"|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[<>!]=|[a-zA-Z]{4,}|\s+|[^$€£¥°]', re.DOTALL
)


def quote_text(match: re.Match) -> str:
    r"""Quote the content of a \text{}; one with a digit is the answer itself and stays bare."""
    if re.search(r"\d", match[1]):
        return f" {match[1]} "
    return ",".join(f'"{phrase}"' for phrase in match[1].split(","))


def mixed_number(match: re.Match) -> str:
    """Write 2 1/3 as a sum, if the fraction is below 1."""
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else match[0]


def repeating_decimal(match: re.Match) -> str:
    r"""Write 0.1\overline{6} as a sum."""
    whole, digits, period = match.groups()
    denominator = "9" * len(period) + "0" * len(digits)
    return rf"({whole or 0}.{digits}0+\frac{{{period}}}{{{denominator}}})"


# On each line one spelling, then its synonyms.
SPELLINGS = r"""
    <=           \leq \le \leqslant ≤
    >=           \geq \ge \geqslant ≥
    !=           \neq \ne ≠
    <            \lt
    >            \gt
    \approx      ≈
    \pm          ±
    -            − –
    *            \cdot \times × ·
    /            \div ÷
    ^            **
    ^2           ²
    ^3           ³
    '            ^{\prime} ^\prime ′
    °            ^{\circ} ^\circ \degree
    ¥            \yen
    cents        ¢ \cent
    dollars      USD
    "percent"    % \% \text{%} \text{\%}
    :            {:}
    |            \vert \lvert \rvert
    (            \langle
    )            \rangle
    \{           \lbrace
    \}           \rbrace
    \lfloor{     \lfloor ⌊
    \lceil{      \lceil ⌈
    }            \rfloor \rceil ⌋ ⌉
    \frac        \dfrac \tfrac \cfrac \over
    \frac{1}{2}  ½
    \frac{1}{4}  ¼
    \frac{3}{4}  ¾
    \binom       \dbinom \tbinom \choose
    \pmod        \bmod \mod
    \ldots       \dots \cdots \dotsc \dotsb … ...
    \emptyset    \varnothing ∅
    \infty       ∞
    \cup         ∪
    \pi          π
    \sqrt        √
"""
SYNONYMS = {}
for line in SPELLINGS.strip().splitlines():
    spelling, *synonyms = line.split()
    SYNONYMS.update(dict.fromkeys(synonyms, spelling + " "))

END = "(?![a-zA-Z])"
SYNONYM = "|".join(re.escape(word) + (END if word[0] == "\\" else "") for word in SYNONYMS)

# (pattern, replacement), applied in this order. END stands for the end of a command or word.
REWRITES = [
    # formatting and spaces; a single dollar sign before a number is money
    (r"\\(?=\$)|(?<!\\)\$(?!\s*[\d.][^$]*$)", ""),
    (r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ""),  # 12,\!345
    (r"\\!\s*|(?<!\\)\\[()\[\]]|\\boxedEND|\bRs\.?(?=\s*\d)", ""),
    (
        r"\\(?:left|right|middle|[bB]igg?[lr]?)END\.?"
        r"|\\(?:displaystyle|limits|phantom|bf|rm|it)END",
        "",
    ),
    (r"(?:(?<!\\)\\[,;:> ]|~|\\q?quadEND|\s)+", " "),
    (r"^ ?(?:\\approxEND|≈|=)", ""),
    (r"(?:(?<!\d{4})(?<=\d) |(?<=\d)\{,\})(?=\d{3}(?![\d/]))", ""),  # 12 345
    (r"(?:\{|^)((?:[^{}]|\{[^{}]*\})*)(\\over|\\choose)END([^{}]*)(?:\}|$)", r"\2{\1}{\3}"),
    (SYNONYM, lambda match: SYNONYMS[match[0]]),
    # text
    (r"(\\(?:text|mathrm) ?\{[^{}\d]*)\^ ?\{?(\d)\}? ?\}", r"\1}^\2"),  # \mathrm{cm^2}
    (r"(?<=[\d°]) *\\mathrm ?\{ ?([A-Z]) ?\}|(?<=°) *([CF])END", r'"\1\2"'),  # 12 \mathrm{V}
    (
        r"\\math(?:bb|bf) ?(?:\{R\}|R)|ℝ|(?:^ ?|(?<=\\in ))R ?$"
        r"|\\text ?\{ ?[Aa]ll real numbers ?\}|^all real numbers$",
        r"(-\\infty,\\infty)",
    ),
    (r"\\(?:math(?:rm|bf|it)|boldsymbol) ?\{([eidx-zA-Z]|\W*\d[^{}]*)\}", r" \1"),
    (
        r"\\(?:text(?:bf|rm|it|normal)?|[mh]box|math(?:rm|bf|it)|operatorname) ?\{([^{}]*)\}",
        quote_text,
    ),
    (r'"[\s,]*(?:and|or)[\s,]*"|\b(?:and|or)\b', r"\\cup "),
    (
        r'(?i)(?<![^_{"])"? *(' + "|".join(NUMBERS) + r') *"?(?![^}"])',
        lambda match: str(NUMBERS.index(match[1].lower())),
    ),
    (
        r'(?i)(?:(?<=:\d\d)|(?<=\d)[ "])[ "]*([ap])\.? ?m(?! *[a-z^+*/-])\.?"?',
        r'"\1m"',
    ),  # 8:30 a.m.
    (
        r'" *(?:if|for|when) *"|, *(?=&|\\\\|\\end)|(?<=^")an? |^an (?=[a-z]{3})',
        "",
    ),  # in cases; an ellipse
    (r'(?<=\d)(?: ?\^ ?\{ ?"?(?:st|nd|rd|th)"? ?\}|[ "]*(?:st|nd|rd|th)END"?)', ""),  # 5th
    (r'"? ?\bmod\b ?"?', r"\\pmod "),
    # numbers
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"(?<![a-zA-Z])C ?_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![:\d])(\d+):00(?![:\d])", r"\1"),
    (r"(?<![\w.])(\d+\.\d+(?=[eE]-)|\d[\d.]*(?=[eE]\+?\d))[eE]\+?(-?\d+)(?!\w)", r"{\1*10^{\2}}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", repeating_decimal),
    (r"(?<![\d.^_a-zA-Z])(\d+) ?\\frac ?\{(\d+)\}\{(\d+)\}", mixed_number),
    (r"(?<![\d.^_a-zA-Z])(\d+) (\d+)/(\d+)", mixed_number),
    (  # 123_{4} is a number with a unit
        r"(?<![\w.^])(?:\((\d+)\)|(\d+)) *"
        r'(?:_\{[ ("base)]*(\d+)[ )]*\}|_(\d)|[(" ]*base[" ]*(\d+) ?\)?)(?![^,]*\d)',
        r'\1\2"base"^{\3\4\5}',
    ),
    # names
    (r"m?\\angleEND ?([A-Z]+)|\\overline ?\{([A-Z]{2})\}|\|([A-Z]{2})\|", r"\1\2\3"),
    (r"^ ?f ?\(x\) ?=", "y="),
    (r"(?<![\w\\])([a-z]) ?= ?(?=[a-z] ?=.{0,30}?([^=]{1,30})$)", r"\1=\2,"),  # x = y = 1
    # what stands without a backslash
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)END", r"\\\1"),
    (r"(?<![\\a-zA-Z])(?:oo|infinity)END", r"\\infty "),
    # lists and sets
    (r";", ","),
    (r"\\begin ?\{(cases|aligned)\}([^&]*?)\\end ?\{\1\}", r"\2"),  # a system
    (r"^\]|(?<=\\cup )\]", "("),  # ]1,2[ is (1,2)
    (r"\[$|\[(?= ?\\cup)", ")"),
    (r" ?\(([a-z] ?\\in[^()]*)\)$", r", \1"),
    (r"(?<=[\])]) ?U ?(?=[\[(])", r"\\cup "),
    (
        r"(?:\w ?\\in ?)?\(-\\infty,\\infty\) ?(?:\\setminus|\\backslash|-) ?\\\{([^{},]*)\\\}",
        r"x!=\1",
    ),
    (r"\\\{ ?[a-zA-Z] ?(?:\\in ?\(-\\infty,\\infty\))? ?(?:\||:|\\mid) ?(.*?)\\\}", r"\1"),
    # units: 18 dollars, 10cm^2
    (
        r"(?<=[\d)}°])((?: [a-zA-Z]{4,}| ?(?:cents|pct|[kcm]m|kg|ft|lbs?|oz|mph|min|men|per)END)"
        r"(?:[ /][a-zA-Z]+)*)(?= ?(?:\^\d|,|$))",
        r'"\1"',
    ),
    (r'\\frac ?\{("[^"]*")\}\{("[^"]*"(?:\^\d)?)\}', r"\1/\2"),
    (r'" *(?:square|sq\.?) ([^"]+)"', r'"\1"^2'),
    (r'" *(?:cubic|cu\.?) ([^"]+)"', r'"\1"^3'),
]
REWRITES = [(re.compile(old.replace("END", END)), new) for old, new in REWRITES]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def normalise(text: str) -> str:
    """Rewrite an answer in one spelling, with text and units in quotes."""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,: ")


def join_thousands(text: str, lists: str = "") -> str:
    """Write 12,345 as 12345, unless the pattern `lists` says that the text is a list.

    In brackets too a comma separates, except beside commas with a space, as in (1,000, 2,000).
    """
    if re.fullmatch(lists, text) or (re.search(r"[(\[]|\\{", text) and ", " not in text):
        return text
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)


def plain_text(text: str) -> str:
    """Return a normalised answer as plain text: no quotes and spaces, (B) as B, Odd as odd."""
    text = re.sub(r'(?i)"[ap]m"|["$€£¥°]|(?<!\d) | (?!\d)', "", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)
    return text[0].lower() + text[1:] if re.fullmatch(r"[a-zA-Z]{2,}", text) else text


def units_differ(one: str, other: str) -> bool:
    """Return whether two answers have different units, as in dollars and cents, or cm and cm^2.

    A unit may be left out on one side, or be abbreviated: the letters of mph are, in this order,
    among those of miles per hour. Only a word of four letters or more is abbreviated, or a plural.
    """
    words, powers = units(one)
    other_words, other_powers = units(other)
    short, long = sorted((words, other_words), key=len)
    letters = iter(long)
    is_same = short[:1] == long[:1] and all(letter in letters for letter in short)
    is_same = is_same and len(long) > 3
    if short in LETTERS:  # m is metres, and neither miles nor minutes
        is_same = long.startswith(LETTERS[short])
    is_same = is_same or long == short or (long == short + "s" and short != "m")
    is_same = is_same or long.endswith(" " + short)  # large eggs are eggs
    is_rate = re.match(short + r" (per|h|hr|s|sec)\b", long)  # km is not km/h
    return short != "" and (powers != other_powers or not is_same or bool(is_rate))


def units(text: str) -> tuple:
    """Return the quoted words in a normalised answer, without names, and their exponents."""
    text = text.translate(str.maketrans(UNITS)).lower()
    quoted = re.findall(r'(?<!\{)"([ a-z][^"]*)"(?! ?=)(?: ?\^ ?\{?(\d+))?', text)
    words = re.findall("[a-z]+", " ".join(phrase for phrase, _ in quoted))
    unscaled = " ".join(word for word in words if word not in SCALES)
    return unscaled, [power for _, power in quoted if power]
