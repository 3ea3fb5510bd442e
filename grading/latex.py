r"""Gives LaTeX one spelling: `\dfrac12` and `\frac{1}{2}` become the same text of TOKENs."""

import re

TOKEN = re.compile(
    r'"[^"]*"|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[<>!]=|[a-zA-Z]{4,}|\s+|.', re.DOTALL
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


# (pattern, replacement), applied in this order. END stands for the end of a command or word.
REWRITES = [
    # formatting and spaces
    (r"(?<=\d)\\,(?=\d{3}(?!\d))|\\!\s*|\\?\$|€|£|(?<!\\)\\[()\[\]]|\\boxedEND", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?)END\.?|\\(?:displaystyle|limits|phantom|bf|rm|it)END", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quadEND|\s+", " "),
    (r"^\s*(?:\\approxEND|=)", ""),
    # text
    (r"\\(?:math(?:rm|bf|it)|boldsymbol)\s*\{([eidx-zA-Z]|\W*\d[^{}]*)\}", r" \1"),
    (
        r"\\(?:text(?:bf|rm|it|normal)?|[mh]box|math(?:rm|bf|it)|operatorname)\s*\{([^{}]*)\}",
        quote_text,
    ),
    (r'"[\s,]*(?:and|or)[\s,]*"|\b(?:and|or)\b|;', ","),
    # numbers; 10\% is 10, as in all public test suites
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degreeEND|°|\\?%", ""),
    (r"\\[dtc]fracEND", r"\\frac"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"(?<=\d)\{,\}(?=\d{3})", ""),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", repeating_decimal),
    (r"(?<![\d.^_a-zA-Z])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", mixed_number),
    (r"(?<![\d.^_a-zA-Z])(\d+) (\d+)/(\d+)", mixed_number),
    # signs
    (r"\\leq?(?:slant)?END|≤", "<="),
    (r"\\geq?(?:slant)?END|≥", ">="),
    (r"\\neq?END|≠", "!="),
    (r"\\ltEND", "<"),
    (r"\\gtEND", ">"),
    (r"±", r"\\pm"),
    (r"−", "-"),
    (r"\\(?:cdot|times)END|×|·", "*"),
    (r"\\divEND|÷", "/"),
    (r"\\[lr]?vertEND", "|"),
    (r"\\langleEND", "("),
    (r"\\rangleEND", ")"),
    (r"\\lbraceEND", r"\\{"),
    (r"\\rbraceEND", r"\\}"),
    (r"(?<=[\])]) ?(?:U|∪) ?(?=[\[(])", r"\\cup "),
    (r"\\varnothingEND|∅", r"\\emptyset "),
    # what stands without a backslash
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)END", r"\\\1"),
    (r"π", r"\\pi "),
    (r"√", r"\\sqrt "),
    (r"(?<![\\a-zA-Z])(?:oo|infinity)END|∞", r"\\infty "),
    # units: 18 dollars, 10cm^2
    (
        r"(?<=[\d)}])((?: [a-zA-Z]{4,}| ?(?:pct|[kcm]m|kg|ft|lbs?|oz|mph|min|men|per)END)"
        r"(?:[ /][a-zA-Z]+)*)(?= ?(?:\^\d|,|$))",
        r'"\1"',
    ),
]
REWRITES = [(re.compile(old.replace("END", "(?![a-zA-Z])")), new) for old, new in REWRITES]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def normalise(text: str) -> str:
    """Rewrite an answer in one spelling, with text and units in quotes."""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if not re.search(r"[(\[]|\\{", text):  # within brackets a comma separates items
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text.strip().rstrip(".,: ")


def plain_text(text: str) -> str:
    """Return a normalised answer as plain text: no quotes and spaces, (B) as B, Odd as odd."""
    text = re.sub(r'"|(?<!\d) | (?!\d)', "", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)
    return text[0].lower() + text[1:] if re.fullmatch(r"[a-zA-Z]{2,}", text) else text


def units_differ(one: str, other: str) -> bool:
    """Return whether two answers have different units, as in dollars and cents, or cm^2 and cm^3.

    A unit may be left out on one side, or abbreviated: units differ if they share no initial.
    """
    initials, powers = units(one)
    other_initials, other_powers = units(other)
    if initials and other_initials and not initials & other_initials:
        return True
    return bool(powers and other_powers) and powers != other_powers


def units(text: str) -> tuple:
    """Return the initials of the quoted words in a normalised answer, and their exponents."""
    quoted = re.findall(r'"([^"]+)"(?: ?\^ ?\{?(\d+))?', text)
    phrases = " ".join(phrase for phrase, _ in quoted).lower()
    return {word[0] for word in phrases.split()}, [power for _, power in quoted if power]
