r"""LaTeX to one spelling: what only looks different, `\dfrac12` and `\frac{1}{2}`, becomes one text of TOKENs."""

import re

TOKEN = re.compile(r'"[^"]*"|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[<>!]=|[a-zA-Z]{4,}|\s+|.', re.DOTALL)


def words(match: re.Match) -> str:
    """Text within an expression in quotes, piece by piece; what holds a digit is no text but an answer in text mode."""
    if re.search(r"\d", match[1]):
        return f" {match[1]} "
    return ",".join(f'"{piece}"' for piece in match[1].split(","))


def mixed(match: re.Match) -> str:
    """2 1/3 as a sum, where the fraction is below 1."""
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else match[0]


def repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as a sum."""
    whole, digits, period = match.groups()
    return rf"({whole or 0}.{digits}0+\frac{{{period}}}{{{'9' * len(period)}{'0' * len(digits)}}})"


REWRITES = [(re.compile(pattern.replace("END", "(?![a-zA-Z])")), replacement) for pattern, replacement in (
    # dressing and spaces
    (r"(?<=\d)\\,(?=\d{3}(?!\d))|\\!\s*|\\?\$|€|£|(?<!\\)\\[()\[\]]|\\boxedEND", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?)END\.?|\\(?:displaystyle|limits|phantom|bf|rm|it)END", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quadEND|\s+", " "),
    (r"^\s*(?:\\approxEND|=)", ""),
    # words
    (r"\\(?:math(?:rm|bf|it)|boldsymbol)\s*\{([eidx-zA-Z]|\W*\d[^{}]*)\}", r" \1"),
    (r"\\(?:text(?:bf|rm|it|normal)?|[mh]box|math(?:rm|bf|it)|operatorname)\s*\{([^{}]*)\}", words),
    (r'"[\s,]*(?:and|or)[\s,]*"|\b(?:and|or)\b|;', ","),
    # numbers; 10\% is 10, as in all public test suites
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degreeEND|°|\\?%", ""),
    (r"\\[dtc]fracEND", r"\\frac"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"(?<=\d)\{,\}(?=\d{3})", ""),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", repeating),
    (r"(?<![\d.^_a-zA-Z])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", mixed),
    (r"(?<![\d.^_a-zA-Z])(\d+) (\d+)/(\d+)", mixed),
    # signs
    (r"\\leq?(?:slant)?END|≤", "<="), (r"\\geq?(?:slant)?END|≥", ">="), (r"\\neq?END|≠", "!="),
    (r"\\ltEND", "<"), (r"\\gtEND", ">"), ("±", r"\\pm"), ("−", "-"),
    (r"\\(?:cdot|times)END|×|·", "*"), (r"\\divEND|÷", "/"), (r"\\[lr]?vertEND", "|"),
    (r"\\langleEND", "("), (r"\\rangleEND", ")"), (r"\\lbraceEND", r"\\{"), (r"\\rbraceEND", r"\\}"),
    (r"(?<=[\])]) ?(?:U|∪) ?(?=[\[(])", r"\\cup "), (r"\\varnothingEND|∅", r"\\emptyset "),
    # what stands without a backslash
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)END", r"\\\1"), ("π", r"\\pi "), ("√", r"\\sqrt "),
    (r"(?<![\\a-zA-Z])(?:oo|infinity)END|∞", r"\\infty "),
    (r"(?<=[\d)}])((?: [a-zA-Z]{4,}| ?(?:pct|[kcm]m|kg|ft|lbs?|oz|mph|min|men|per)END)(?:[ /][a-zA-Z]+)*)"
     r"(?= ?(?:\^\d|,|$))", r'"\1"'),  # 18 dollars, 10cm^2
)]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def normalise(text: str) -> str:
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if not re.search(r"[(\[]|\\{", text):  # within brackets a comma separates
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text.strip().rstrip(".,: ")


def wording(text: str) -> str:
    """A normalised text as words: no quotes, no spaces but between digits, (B) as B, and Odd as odd."""
    text = re.sub(r'"|(?<!\d) | (?!\d)', "", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)
    return text[0].lower() + text[1:] if re.fullmatch(r"[a-zA-Z]{2,}", text) else text


def units_differ(one: str, other: str) -> bool:
    """A unit may be left out, but cents are no dollars (no initial in common) and cm^2 is not cm^3."""
    quoted = [re.findall(r'"([^"]+)"(?: ?\^ ?\{?(\d+))?', text) for text in (one, other)]
    initials = [{word[0] for phrase, _ in found for word in phrase.lower().split()} for found in quoted]
    powers = [[power for _, power in found if power] for found in quoted]
    return (all(initials) and not initials[0] & initials[1]) or (all(powers) and powers[0] != powers[1])
