"""Two final answers as trees of lists, sets, tuples, matrices, relations and values, and whether they match."""

import re
from itertools import accumulate

from grading import values
from grading.expressions import Expression
from grading.latex import TOKEN, normalise, units_differ, wording
from grading.values import Budget, NoValue

_RELATIONS = {"=", "!=", "<", "<=", ">", ">=", r"\in"}
_LETTER = r"(?!\\pi|\\infty)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?'*"
_NAME = re.compile(rf'(?:{_LETTER}|"[a-zA-Z ]+")(?:\([\w, ]+\))?|\({_LETTER}(?:, ?{_LETTER})*\)')  # x_1, f(x), (a, b)
_MATRIX = re.compile(r"\\begin\{((?:small|[pbB])?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_OPENING, _CLOSING = ["(", "[", "{", r"\{"], [")", "]", "}", r"\}"]


def is_equal(answer: str, gold: str) -> bool:
    r"""Whether two final answers, in LaTeX or plain, are mathematically the same. Exact: no tolerance, no rounding.

    Units, percent and degree signs, and one side's `x =` are ignored; lists, sets and unions may be in any order,
    tuples, intervals and matrices not. What is no mathematics is compared as text. Work is bounded; nothing is raised.

    >>> is_equal(r"x = 1\frac{1}{2} \text{ cm}", "3/2")
    True
    >>> is_equal("[0,9)", "(0,9)")
    False
    """
    if len(answer) + len(gold) > 1000:
        return answer.strip() == gold.strip() != ""
    one, other = normalise(answer), normalise(gold)
    if not wording(one) or not wording(other) or wording(one) == wording(other):
        return wording(one) == wording(other) != ""
    if units_differ(one, other):
        return False
    budget = Budget()
    try:
        return match(read(one, budget), read(other, budget), budget)
    except NoValue:
        return False


def split(text: str, separators: set) -> tuple[list[str], list[str]]:
    """The pieces between separators that stand outside all brackets, and those separators."""
    depth, pieces, found = 0, [""], []
    for token in TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in separators:
            pieces.append("")
            found.append(token)
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces], found


def read(text: str, budget: Budget, depth: int = 0) -> tuple:
    """The tree of a normalised text, a tuple of its kind and its parts.

    ("list", items), ("set", items), ("[)", items) for any other brackets, ("matrix", rows), ("value", its value),
    ("text", letters), and (sign, left, right, text of left, text of right) for a relation, > and >= turned round.
    """
    if depth > 8:
        raise NoValue("too deep")

    def inner(part: str) -> tuple:
        return read(part, budget, depth + 1)

    def joined(pieces: list[str]) -> tuple:
        trees = [inner(piece) for piece in pieces if piece]
        return "list", [item for tree in trees for item in (tree[1] if tree[0] == "list" else [tree])]

    pieces, found = split(text, {",", r"\cup"})  # a union is a list of intervals
    if found:
        return joined(pieces)
    pieces, found = split(text, _RELATIONS)
    if found and found[0][0] == ">":
        pieces, found = pieces[::-1], [sign.replace(">", "<") for sign in found[::-1]]
    if len(found) > 1 and set(found) == {"="}:  # x = 2 + 3 = 5
        pieces, found = [pieces[0] if _NAME.fullmatch(pieces[0]) else pieces[-2], pieces[-1]], ["="]
    named = [bool(_NAME.fullmatch(piece)) for piece in pieces]
    if named == [False, True, False] and set(found) <= {"<", "<="}:
        brackets = ("[" if "=" in found[0] else "(") + ("]" if "=" in found[1] else ")")
        return brackets, [inner(pieces[0]), inner(pieces[2])]  # a < x <= b is (a, b]
    if len(found) > 1:
        return "text", wording(text)
    if found:
        return found[0], inner(pieces[0]), inner(pieces[1]), *pieces
    tokens = TOKEN.findall(text) or [""]
    if matrix := _MATRIX.fullmatch(text):
        rows = split(matrix[2], {r"\\"})[0]
        return "matrix", [("row", [inner(cell) for cell in split(row, {"&"})[0]]) for row in rows if row]
    depths = list(accumulate((token in _OPENING) - (token in _CLOSING) for token in tokens))
    if tokens[0] in _OPENING and 0 in depths and depths.index(0) == len(tokens) - 1:
        pieces, found = split("".join(tokens[1:-1]), {","})
        if not found and tokens[-1] == _CLOSING[_OPENING.index(tokens[0])]:
            return inner(pieces[0])
        if found and "{" in tokens[0]:
            return "set", joined(pieces)[1]
        if found:
            return tokens[0] + tokens[-1], [inner(piece) for piece in pieces]
    if r"\pm" in tokens:
        plus, minus = (text.replace(r"\pm", a).replace(r"\mp", b) for a, b in ("+-", "-+"))
        return joined([plus, minus])
    try:
        return "value", Expression(text, budget).value()
    except NoValue:
        return "text", wording(text)


def match(a: tuple, b: tuple, budget: Budget) -> bool:
    """Whether two trees mean the same."""
    kinds = {a[0], b[0]}
    if len(kinds) == 2 and kinds != {"list", "set"}:
        if b[0] in _RELATIONS:
            a, b = b, a
        return a[0] in _RELATIONS and (bare := without_name(*a, budget)) is not None and match(bare, b, budget)
    if a[0] == "text":
        return a[1] == b[1]
    if a[0] == "value":
        return values.equal(a[1], b[1], budget)
    if a[0] in _RELATIONS:
        return match_relations(a, b, budget)
    if len(a[1]) != len(b[1]):
        return False
    names = [{item[3].partition("_")[0] for item in tree[1] if item[0] == "="} for tree in (a, b)]
    if not kinds <= {"list", "set"} or (max(map(len, names)) > 1 and not all(names)):  # x = 1, y = 2 has an order
        return all(match(x, y, budget) for x, y in zip(a[1], b[1]))
    left = list(b[1])
    for x in a[1]:
        place = next((i for i, y in enumerate(left) if match(x, y, budget)), None)
        if place is None:
            return False
        del left[place]
    return True


def without_name(sign: str, left: tuple, right: tuple, left_text: str, right_text: str, budget: Budget) -> tuple | None:
    """`x = 3` as 3, `2 + 1 = 3` too, `x in S` as S, `x < 3` as (-infinity, 3); None for what says more."""
    named = [bool(_NAME.fullmatch(text)) for text in (left_text, right_text)]
    if sign in ("=", r"\in"):
        return right if named[0] or (sign == "=" and match(left, right, budget)) else None
    if sign == "!=" or named[0] == named[1]:
        return None
    infinity = values.symbol(r"\infty")
    if named[0]:
        return ("(]" if "=" in sign else "()"), [("value", values.negative(infinity)), right]
    return ("[)" if "=" in sign else "()"), [left, ("value", infinity)]


def match_relations(a: tuple, b: tuple, budget: Budget) -> bool:
    """The same sides, or left - right the same up to a factor, which an inequality needs positive."""
    if match(a[1], b[1], budget) and match(a[2], b[2], budget):
        return True
    if {side[0] for side in (*a[1:3], *b[1:3])} != {"value"}:
        return False
    (n, d), (m, e) = (values.difference(relation[1][1], relation[2][1], budget) for relation in (a, b))
    if n.keys() != m.keys() or not n.keys() - {()} or (a[0][0] == "<" and (d, e) != (values.ONE, values.ONE)):
        return False
    ratios = {n[monomial] / m[monomial] for monomial in n}
    return len(ratios) == 1 and (a[0][0] != "<" or ratios.pop() > 0)


def answer_key(answer: str) -> str:
    """A text that equal answers share, to count votes by; answers that share it are equal, units aside."""

    def key(tree: tuple) -> str:
        if tree[0] in ("value", "text"):
            return values.canonical(tree[1]) if tree[0] == "value" else tree[1]
        if tree[0] in _RELATIONS:
            return f"{key(tree[1])} {tree[0]} {key(tree[2])}"
        parts = [key(part) for part in tree[1]]
        return f"list{sorted(parts)}" if tree[0] in ("list", "set") else f"{tree[0]}{parts}"

    if len(answer) > 1000:
        return answer.strip()
    text = normalise(answer)
    try:
        return wording(text) if re.fullmatch("[a-zA-Z]{2,}", wording(text)) else key(read(text, Budget()))
    except NoValue:
        return wording(text)
