"""Rewards: what a completion is worth, by a grader (RLVR) or by the model's own confidence (RLIF).

RLVR's grader looks at the completion's text, never at the prompt. RLIF's rewards are read off what the sampler recorded
of every drawn token; they carry no gradient and never see `correct`.
"""

import re
from itertools import accumulate

from torch import Tensor

import latex
from latex import TOKEN, Budget, Expression, NoValue, normalise, units_differ, wording
from verify import math_verify

_STEP = re.compile(r"\s*(-?\d{1,9})\s*([-+*/])\s*(-?\d{1,9})\s*=\s*(-?\d{1,9})\s*", re.ASCII)


def solves_countdown(text: str, numbers: list[int], target: int) -> bool:
    """Whether a chain of steps uses each number once and ends at the target.

    A step `a op b = c` takes a and b from the numbers still there and puts c among them; its
    arithmetic must hold in whole numbers. Work is linear in the text: no `eval`, no long integers.

    >>> solves_countdown("3*5=15, 15+7=22, 22+2=24", [3, 5, 7, 2], 24)
    True
    >>> solves_countdown("3*5=15, 15+9=24", [3, 5, 7, 2], 24)      # 9 was not given, 7 and 2 are left over
    False
    """
    left = list(numbers)
    steps = text.split(",", len(numbers))  # a valid chain has len(numbers) - 1 steps: look no further
    if len(steps) != len(numbers) - 1 and not (len(numbers) == 1 and not text.strip()):
        return False
    for step in steps if len(numbers) > 1 else []:
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        a, op, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in left:
                return False
            left.remove(operand)
        holds = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and b * c == a}
        if not holds[op]:
            return False
        left.append(c)
    return left == [target]


# ---------------------------------------------------------------- mathematics

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_RELATIONS = {"=", "!=", "<", "<=", ">", ">=", r"\in"}
_LETTER = r"(?!\\pi|\\infty)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?'*"
_NAME = re.compile(rf'(?:{_LETTER}|"[a-zA-Z ]+")(?:\([\w, ]+\))?|\({_LETTER}(?:, ?{_LETTER})*\)')  # x_1, f(x), (a, b)
_MATRIX = re.compile(r"\\begin\{((?:small|[pbB])?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_OPENING, _CLOSING = ["(", "[", "{", r"\{"], [")", "]", "}", r"\}"]


def extract_answer(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds whose braces balance; None if there is none.

    Only the last 20,000 characters are looked at, which bounds the work.

    >>> extract_answer(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}, or even \boxed{3")
    '\\frac{1}{2}'
    """
    text = text[-20_000:]
    depth, boxes, last = 0, [], (-1, -1)  # boxes: depth and place of those still open
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            if boxes and boxes[-1][0] == depth:
                _, start = boxes.pop()
                last = max(last, (start, token.start()))
            depth -= 1
        elif token[0] == "{" or token[0].startswith(r"\boxed"):
            depth += 1
            if token[0] != "{":
                boxes.append((depth, token.end()))
    return text[slice(*last)] if last[0] >= 0 else None


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

    ("list", items), ("set", items), ("[)", items) for any other brackets, ("matrix", rows), ("value", latex's),
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
        return latex.equal(a[1], b[1], budget)
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
    infinity = latex.symbol(r"\infty")
    if named[0]:
        return ("(]" if "=" in sign else "()"), [("value", latex.negative(infinity)), right]
    return ("[)" if "=" in sign else "()"), [left, ("value", infinity)]


def match_relations(a: tuple, b: tuple, budget: Budget) -> bool:
    """The same sides, or left - right the same up to a factor, which an inequality needs positive."""
    if match(a[1], b[1], budget) and match(a[2], b[2], budget):
        return True
    if {side[0] for side in (*a[1:3], *b[1:3])} != {"value"}:
        return False
    (n, d), (m, e) = (latex.difference(relation[1][1], relation[2][1], budget) for relation in (a, b))
    if n.keys() != m.keys() or not n.keys() - {()} or (a[0][0] == "<" and (d, e) != (latex.ONE, latex.ONE)):
        return False
    ratios = {n[monomial] / m[monomial] for monomial in n}
    return len(ratios) == 1 and (a[0][0] != "<" or ratios.pop() > 0)


def answer_key(answer: str) -> str:
    """A text that equal answers share, to count votes by; answers that share it are equal, units aside."""

    def key(tree: tuple) -> str:
        if tree[0] in ("value", "text"):
            return latex.canonical(tree[1]) if tree[0] == "value" else tree[1]
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


GRADERS = {"exact": is_equal, "math_verify": math_verify}

# ---------------------------------------------------------------- RLVR and RLIF


def accuracy(correct: Tensor, rollout) -> Tensor:
    """1 for a correct completion, else 0: the verifiable reward.  [B]"""
    return correct.float()


def self_certainty(correct: Tensor, rollout) -> Tensor:
    """Mean over tokens of KL(uniform || policy): Intuitor, Zhao et al. 2025.  [B]"""
    return mean_over_tokens(rollout.self_certainty, rollout.mask)


def token_entropy(correct: Tensor, rollout) -> Tensor:
    """Minus the mean entropy of the policy over tokens: RENT, Prabhudesai et al. 2025.  [B]"""
    return -mean_over_tokens(rollout.entropy, rollout.mask)


def trajectory_likelihood(correct: Tensor, rollout) -> Tensor:
    """sum_t log pi(y_t), a sum, so that short completions pay: EM-RL-sequence, Agarwal et al. 2025.  [B]"""
    return (rollout.logprobs * rollout.mask).sum(dim=1)


def trajectory_entropy(correct: Tensor, rollout) -> Tensor:
    """-sum_t H_t, likewise a sum: EM-RL-token, Agarwal et al. 2025.  [B]"""
    return -(rollout.entropy * rollout.mask).sum(dim=1)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row's valid tokens.  [B, C], bool [B, C] -> [B]"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


# Each: (correct bool [B], rollout with [B, C] records) -> [B].
REWARDS = {
    "accuracy": accuracy,
    "self_certainty": self_certainty,
    "token_entropy": token_entropy,
    "trajectory_likelihood": trajectory_likelihood,
    "trajectory_entropy": trajectory_entropy,
}
