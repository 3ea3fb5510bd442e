"""Compares two final answers as trees of lists, sets, tuples, matrices, relations and values."""

import re
from itertools import accumulate
from typing import NamedTuple

from grading.exact import ONE, Budget, NoValue, read_value, symbol
from grading.latex import TOKEN, join_thousands, normalise, plain_text, units_differ

RELATIONS = {"=", "!=", "<", "<=", ">", ">=", r"\in"}
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\begin": r"\end"}
LETTER = r"(?!\\pi|\\infty)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?'*"
NAME = re.compile(  # x_1, f(x), \sin A, "Area", (a, b), \frac{a}{b}, m + n; but x + y = 1 is a line
    rf'(?:{LETTER}|\\(?:sin|cos|tan) ?{LETTER}|"[a-zA-Z ]+")(?:\([\w, ]+\))?'
    rf"|\({LETTER}(?:, ?{LETTER})*\)|\\frac ?\{{{LETTER}\}}\{{{LETTER}\}}|[a-w](?: ?\+ ?[a-w])+"
)
MATRIX = re.compile(
    r"\\begin\{((?:small|[pbB])?matrix|array|cases)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL
)


def is_equal(answer: str, gold: str) -> bool:
    r"""Return whether two final answers, in LaTeX or plain, are mathematically the same.

    Exact: no tolerance, no rounding. One side may leave out a unit, a base, a.m., or `x =`; 50% is
    50 or 1/2. Lists, sets and unions may be in any order; tuples, intervals, matrices and lists of
    words may not. What is no mathematics is compared as text. Work is bounded, and nothing is
    raised.

    >>> is_equal(r"x = 1\frac{1}{2} \text{ cm}", "3/2")
    True
    >>> is_equal("[0,9)", "(0,9)")
    False
    """
    if len(answer) + len(gold) > 1000:
        return answer.strip() == gold.strip() != ""
    answer = normalise(answer)
    gold = normalise(gold)
    if not plain_text(answer) or not plain_text(gold) or units_differ(answer, gold):
        return False
    budget = Budget()
    return any(is_same(one, other, budget) for one, other in dict.fromkeys(readings(answer, gold)))


# If one side alone matches a pattern, the replacements are further readings of it.
MEANINGS = [
    (re.compile('" ?percent"'), ["/100"]),
    (re.compile(r"^(.+)\\approx(?![a-z])(.+)$"), [r"\1", r"\2"]),
    (re.compile(r'^["(]*([A-F])"?(?:[.)]|: )[)": ]*([^)": ].*)$'), [r"\1", r"\2"]),  # (B) 12
]


def readings(answer: str, gold: str) -> list[tuple]:
    """Return pairs of texts, one of which must match: 101,103 may be one number or two."""
    number_list = r"\d{3}(?:,[1-9]\d\d)+"
    one = join_thousands(answer)
    other = join_thousands(
        gold, rf"{number_list}(?<!0)"
    )  # a number that ends in 0 is rarely one of a list
    pairs = [(one, other), (join_thousands(answer, number_list), join_thousands(gold, number_list))]
    for pattern, meanings in MEANINGS:
        if bool(pattern.search(one)) != bool(pattern.search(other)):
            pairs += [(pattern.sub(new, one), pattern.sub(new, other)) for new in meanings]
    return pairs


def is_same(answer: str, gold: str, budget: Budget) -> bool:
    """Return whether two normalised texts are equal, or have matching trees."""
    try:
        return plain_text(answer) == plain_text(gold) or is_match(
            read(answer, budget), read(gold, budget)
        )
    except NoValue:
        return False


# ---------------------------------------------------------------- reading


class Node(NamedTuple):
    r"""Holds one node of an answer's tree.

    kind                           content
    list, names, set, matrix, row  nodes; names is a list of words, which has an order
    (), [], (], [), \{\}, ...      the nodes between these brackets
    =, !=, <, <=, \in              the nodes of the two sides, whose texts are `sides`
    value                          a Value
    text                           a string
    """

    kind: str
    content: object
    sides: tuple = ()


def nesting(token: str) -> int:
    """Return 1 for an opening bracket, -1 for a closing one, else 0."""
    return (token in BRACKETS) - (token in BRACKETS.values())


def split(text: str, separators: set) -> tuple[list, list]:
    """Return the pieces between separators outside all brackets, and these separators."""
    depth = 0
    pieces = [""]
    separating = []
    for token in TOKEN.findall(text):
        depth += nesting(token)
        if depth == 0 and token in separators:
            pieces.append("")
            separating.append(token)
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces], separating


def read(text: str, budget: Budget, depth: int = 0) -> Node:
    """Return the tree of a normalised answer."""
    if depth > 8:
        raise NoValue("too deep")

    def read_all(texts):
        return [read(text, budget, depth + 1) for text in texts]

    def read_list(texts):
        """Read the items of a list; a list among them adds its own items."""
        items = []
        for node in read_all(filter(None, texts)):
            items += node.content if node.kind == "list" else [node]
        return sorted(items, key=lambda node: node.sides[:1])  # y = 2, x = 1 as x = 1, y = 2

    items, commas = split(text, {",", r"\\", r"\cup"})  # a union is a list of intervals
    if commas:
        is_names = re.fullmatch('["a-zA-Z, ]+', text)
        return Node("names" if is_names else "list", read_list(items))
    sides, signs = split(text, RELATIONS)
    if signs:
        return read_relation(text, sides, signs, read_all)
    if matrix := MATRIX.fullmatch(text):
        rows = filter(None, split(matrix[2], {r"\\"})[0])
        return Node("matrix", [Node("row", read_all(split(row, {"&"})[0])) for row in rows])
    tokens = TOKEN.findall(text) or [""]
    depths = [*accumulate(map(nesting, tokens)), 0]
    if tokens[0] in BRACKETS and depths.index(0) == len(tokens) - 1:  # all is within one bracket
        items, commas = split("".join(tokens[1:-1]), {","})
        if not commas and tokens[-1] == BRACKETS[tokens[0]]:
            return read(items[0], budget, depth + 1)
        if commas and "{" in tokens[0]:
            return Node("set", read_list(items))
        if commas:
            return Node(tokens[0] + tokens[-1], read_all(items))
    if r"\pm" in tokens:
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Node("list", read_list([plus, minus]))
    try:
        return Node("value", read_value(text, budget))
    except NoValue:
        return Node("text", plain_text(text))


def read_relation(text: str, sides: list, signs: list, read_all) -> Node:
    """Return the tree of a relation: > and >= are turned round, a < x <= b is (a, b]."""
    if signs[0][0] == ">":
        sides = sides[::-1]
        signs = [sign.replace(">", "<") for sign in signs[::-1]]
    if len(signs) > 1 and set(signs) == {"="}:  # x = 2 + 3 = 5 says x = 5
        left = sides[0] if NAME.fullmatch(sides[0]) else sides[-2]
        sides = [left, sides[-1]]
        signs = ["="]
    named = [bool(NAME.fullmatch(side)) for side in sides]
    if named == [False, True, False] and set(signs) <= {"<", "<="}:
        brackets = ("[" if "=" in signs[0] else "(") + ("]" if "=" in signs[1] else ")")
        return Node(brackets, read_all(sides[::2]))
    if len(signs) > 1:
        return Node("text", plain_text(text))
    return Node(signs[0], read_all(sides), tuple(sides))


# ---------------------------------------------------------------- comparing


def is_match(a: Node, b: Node) -> bool:
    """Return whether two trees mean the same."""
    kinds = {a.kind, b.kind}
    is_list = kinds <= {"list", "names", "set"} or (kinds == {"list", "()"} and is_ordered(a, b))
    if len(kinds) == 2 and not is_list:
        if b.kind in RELATIONS:
            return is_match_without_name(b, a)
        return a.kind in RELATIONS and is_match_without_name(a, b)
    if a.kind in ("text", "value"):
        return a.content == b.content
    if a.kind in RELATIONS:
        return is_match_of_relations(a, b)
    if len(a.content) != len(b.content):
        return False
    if not kinds <= {"list", "set"} or is_ordered(a, b):
        return all(map(is_match, a.content, b.content))
    unmatched = list(b.content)
    for x in a.content:
        i = next((i for i, y in enumerate(unmatched) if is_match(x, y)), None)
        if i is None:
            return False
        del unmatched[i]
    return True


def is_ordered(a: Node, b: Node) -> bool:
    """Return whether only one of two lists has names: `x = 1, y = 2` against `1, 2` or `(1, 2)`."""
    counts = []  # how many different names each list has; x = 1, y = 2 has two
    for node in (a, b):
        names = {item.sides[0].partition("_")[0] for item in node.content if item.kind == "="}
        counts.append(len(names))
    return min(counts) == 0 and max(counts) > 1


def is_match_without_name(relation: Node, other: Node) -> bool:
    """Compare x = 3 as 3, 2 + 1 = 3 as 3, x in S as S, x < 3 as (-infinity, 3)."""
    left, right = relation.content
    left_named, right_named = [bool(NAME.fullmatch(side)) for side in relation.sides]
    if relation.kind == "=":
        return (left_named or is_match(left, right)) and is_match(right, other)
    if relation.kind == r"\in":
        return left_named and is_match(right, other)
    infinity = symbol(r"\infty", Budget())
    low = Node("value", -infinity)
    high = Node("value", infinity)
    if relation.kind == "!=":
        halves = [Node("()", [low, right]), Node("()", [right, high])]
        return left_named and is_match(Node("list", halves), other)
    if left_named == right_named:
        return False
    brackets = "(]" if left_named else "[)"
    if relation.kind == "<":
        brackets = "()"
    return is_match(Node(brackets, [low, right] if left_named else [left, high]), other)


def is_match_of_relations(a: Node, b: Node) -> bool:
    """Compare left - right up to a factor, which must be positive for an inequality.

    A name may leave out its subscript: x = 3 is x_1 = 3.
    """
    left = a.sides[0]
    other_left = b.sides[0]
    is_short = left.startswith(other_left + "_") or other_left.startswith(left + "_")
    if (is_short or is_match(a.content[0], b.content[0])) and is_match(a.content[1], b.content[1]):
        return True
    if any(side.kind != "value" for side in (*a.content, *b.content)):
        return False
    one = a.content[0].content + -a.content[1].content
    other = b.content[0].content + -b.content[1].content
    monomials = one.numerator.keys()
    if monomials != other.numerator.keys() or not monomials - {()}:
        return False
    ratios = {one.numerator[monomial] / other.numerator[monomial] for monomial in monomials}
    is_polynomial = one.denominator == other.denominator == ONE
    if a.kind in ("<", "<=") and (min(ratios) < 0 or not is_polynomial):
        return False
    return len(ratios) == 1
