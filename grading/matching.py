"""Compares two final answers as trees of lists, sets, tuples, matrices, relations and values."""

import re
from itertools import accumulate
from typing import NamedTuple

from grading.exact import ONE, Budget, NoValue, read_value, symbol
from grading.latex import TOKEN, normalise, plain_text, units_differ

RELATIONS = {"=", "!=", "<", "<=", ">", ">=", r"\in"}
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
LETTER = r"(?!\\pi|\\infty)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?'*"
NAME = re.compile(  # x_1, f(x), "Area", (a, b)
    rf'(?:{LETTER}|"[a-zA-Z ]+")(?:\([\w, ]+\))?|\({LETTER}(?:, ?{LETTER})*\)'
)
MATRIX = re.compile(
    r"\\begin\{((?:small|[pbB])?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL
)


def is_equal(answer: str, gold: str) -> bool:
    r"""Return whether two final answers, in LaTeX or plain, are mathematically the same.

    Exact: no tolerance, no rounding. Units, percent and degree signs, and one side's `x =` are
    ignored. Lists, sets and unions may be in any order; tuples, intervals and matrices may not.
    What is no mathematics is compared as text. Work is bounded, and nothing is raised.

    >>> is_equal(r"x = 1\frac{1}{2} \text{ cm}", "3/2")
    True
    >>> is_equal("[0,9)", "(0,9)")
    False
    """
    if len(answer) + len(gold) > 1000:
        return answer.strip() == gold.strip() != ""
    answer = normalise(answer)
    gold = normalise(gold)
    text = plain_text(answer)
    gold_text = plain_text(gold)
    if text == gold_text or not text or not gold_text or units_differ(answer, gold):
        return text == gold_text != ""
    budget = Budget()
    try:
        return is_match(read(answer, budget), read(gold, budget))
    except NoValue:
        return False


def answer_key(answer: str) -> str:
    """Return a text to count votes by: answers that share it are equal, units aside."""
    if len(answer) > 1000:
        return answer.strip()
    answer = normalise(answer)
    text = plain_text(answer)
    try:
        return text if re.fullmatch("[a-zA-Z]{2,}", text) else str(read(answer, Budget()))
    except NoValue:
        return text


# ---------------------------------------------------------------- reading


class Node(NamedTuple):
    r"""Holds one node of an answer's tree.

    kind                          content
    list, set, matrix, row        nodes
    (), [], (], [), \{\}, ...     the nodes between these brackets
    =, !=, <, <=, \in             the nodes of the two sides, whose texts are `sides`
    value                         a Value
    text                          a string
    """

    kind: str
    content: object
    sides: tuple = ()

    def __str__(self):
        if self.kind in ("value", "text"):
            return str(self.content)
        nodes = [str(node) for node in self.content]
        if self.kind in ("list", "set"):
            return f"list{sorted(nodes)}"
        return f"{self.kind}{nodes}"


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
        return items

    items, commas = split(text, {",", r"\cup"})  # a union is a list of intervals
    if commas:
        return Node("list", read_list(items))
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
    if len(kinds) == 2 and kinds != {"list", "set"}:
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
    """Return whether two lists must have the same order: `x = 1, y = 2` against `1, 2`."""
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
    if relation.kind == "!=" or left_named == right_named:
        return False
    infinity = symbol(r"\infty", Budget())
    brackets = "(]" if left_named else "[)"
    if relation.kind == "<":
        brackets = "()"
    ends = [Node("value", -infinity), right] if left_named else [left, Node("value", infinity)]
    return is_match(Node(brackets, ends), other)


def is_match_of_relations(a: Node, b: Node) -> bool:
    """Compare left - right up to a factor, which must be positive for an inequality."""
    if all(map(is_match, a.content, b.content)):
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
