"""Rewards: what a completion is worth, by a grader (RLVR) or by the model's own confidence (RLIF).

RLVR's grader looks at the completion's text, never at the prompt. RLIF's rewards are read off what the sampler recorded
of every drawn token; they carry no gradient and never see `correct`.
"""

import re
from itertools import accumulate

from torch import Tensor

from algebra import ONE, TOKEN, Budget, Expression, NoValue, canonical, difference, equal
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
# What only looks, or says the same in other words, is put into one spelling; applied in this order.
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
    (r"\\!\s*|\\?\$|\\(?:displaystyle|limits|left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
    (r"\\(?:text(?:bf|rm|it)?|[mh]box|math(?:rm|bf|it)|operatorname)\s*\{([^{}]*)\}", r'"\1"'),  # words
    (r'"\s*(?:and|or)\s*"|\b(?:and|or)\b|;', ","),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°|\\?%", ""),  # 10\% is 10: a convention of all suites
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)\{,\}(?=\d{3})", ""),
    (r"(?<![\d.^])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),  # mixed numbers
    (r"(?<![\d.^])(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\\leq?(?:slant)?(?![a-zA-Z])|≤", "<="), (r"\\geq?(?:slant)?(?![a-zA-Z])|≥", ">="),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"\\neq?(?![a-zA-Z])|≠", "!="),
    (r"\\(?:cdot|times)(?![a-zA-Z])|×|·", "*"), (r"\\div(?![a-zA-Z])|÷", "/"), ("−", "-"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"), (r"\\cup(?![a-zA-Z])|∪", ","),  # a union is a list of intervals
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![a-zA-Z])", r"\\\1"),
    ("π", r"\\pi"), ("√", r"\\sqrt"), ("∞", r"\\infty"),
    (r"(?<=\d) ?((?:[a-zA-Z]{4,}|pct|[kcm]m|kg|ft|mph)(?: [a-zA-Z]{2,})*)$", r'"\1"'),  # 18 dollars
)]  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_RELATIONS = {"=", "!=", "<", "<=", ">", ">=", r"\in"}
_NAME = re.compile(r'"?\\?[a-zA-Z]+"?(_(\w|\{\w+\}))?(\([a-zA-Z](, ?[a-zA-Z])*\))?|\([a-zA-Z](, ?[a-zA-Z])*\)')
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
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

    Units, percent and degree signs, and one side's `x =` are ignored; lists and unions may be in any order, tuples,
    intervals and matrices not. What is no mathematics is compared as text. Work is bounded; nothing is raised.

    >>> is_equal(r"x = 1\frac{1}{2} \text{ cm}", "3/2")
    True
    >>> is_equal("[0,9)", "(0,9)")
    False
    """
    if len(answer) + len(gold) > 1000:
        return answer.strip() == gold.strip() != ""
    one, other = normalise(answer), normalise(gold)
    words = [re.sub(r"^\((\w)\)$", r"\1", re.sub(r'"|(?<!\d) | (?!\d)', "", text)) for text in (one, other)]
    if words[0] == words[1] or not words[1]:
        return words[1] != ""
    if all(re.fullmatch("[a-zA-Z]{3,}", word) for word in words):
        return words[0].lower() == words[1].lower()
    powers = [re.findall(r'"[^"]*" ?\^ ?\{?(\d+)', text) for text in (one, other)]
    if all(powers) and powers[0] != powers[1]:  # cm^2 is not cm^3, though either may be left out
        return False
    budget = Budget()
    try:
        return match(read(one, budget), read(other, budget), budget)
    except NoValue:
        return False


def normalise(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if not re.search(r"[(\[]|\\{", text):  # within brackets a comma separates
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text.strip().rstrip(".,: ")


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
    """The tree of a normalised text: a tuple of its kind and its parts.

    ("list", items), ("[)", items) for any pair of brackets, ("matrix", rows), ("value", algebra's), ("text", letters),
    and (sign, left, right, text of left, text of right) for a relation, with > and >= turned into < and <=.
    """
    if depth > 8:
        raise NoValue("too deep")

    def inner(part: str) -> tuple:
        return read(part, budget, depth + 1)

    def joined(pieces: list[str]) -> tuple:
        trees = [inner(piece) for piece in pieces if piece]
        return "list", [item for tree in trees for item in (tree[1] if tree[0] == "list" else [tree])]

    pieces, found = split(text, {","})
    if found:
        return joined(pieces)
    pieces, found = split(text, _RELATIONS)
    if len(found) == 2 and "=" not in found and _NAME.fullmatch(pieces[1]):  # a < x <= b is (a, b]
        low, high = (pieces[0], pieces[2]) if found[0][0] == "<" else (pieces[2], pieces[0])
        first, second = found if found[0][0] == "<" else found[::-1]
        return ("[" if "=" in first else "(") + ("]" if "=" in second else ")"), [inner(low), inner(high)]
    if found:
        sign, left, right = found[-1], pieces[-2], pieces[-1]
        if sign[0] == ">":
            sign, left, right = sign.replace(">", "<"), right, left
        return sign, inner(left), inner(right), left, right
    if r"\pm" in text:
        upper, lower = text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")
        return joined([upper, lower])
    if matrix := _MATRIX.fullmatch(text):
        rows = split(matrix[2], {r"\\"})[0]
        return "matrix", [("row", [inner(cell) for cell in split(row, {"&"})[0]]) for row in rows if row]
    tokens = TOKEN.findall(text) or [""]
    depths = list(accumulate((token in _OPENING) - (token in _CLOSING) for token in tokens))
    if tokens[0] in _OPENING and 0 in depths and depths.index(0) == len(tokens) - 1:
        pieces, found = split("".join(tokens[1:-1]), {","})
        if "{" in tokens[0]:
            return joined(pieces) if found else inner(pieces[0])
        if found:
            return tokens[0] + tokens[-1], [inner(piece) for piece in pieces]
    try:
        return "value", Expression(text, budget).value()
    except NoValue:
        return "text", re.sub(r'[\s"{}]', "", text)


def match(a: tuple, b: tuple, budget: Budget) -> bool:
    """Whether two trees mean the same."""
    if a[0] != b[0]:
        if len(b) == 5:
            a, b = b, a
        return len(a) == 5 and (bare := without_name(*a)) is not None and match(bare, b, budget)
    if a[0] == "text":
        return a[1] == b[1]
    if a[0] == "value":
        return equal(a[1], b[1], budget)
    if a[0] in _RELATIONS:
        return match_relations(a, b, budget)
    if len(a[1]) != len(b[1]):
        return False
    names = [{item[3] for item in tree[1] if item[0] == "="} for tree in (a, b)]
    if a[0] != "list" or (max(map(len, names)) > 1 and not all(names)):  # x = 1, y = 2 has an order without the names
        return all(match(x, y, budget) for x, y in zip(a[1], b[1]))
    left = list(b[1])
    for x in a[1]:
        place = next((i for i, y in enumerate(left) if match(x, y, budget)), None)
        if place is None:
            return False
        del left[place]
    return True


def without_name(sign: str, left: tuple, right: tuple, left_text: str, right_text: str) -> tuple | None:
    """`x = 3` as 3, `x in S` as S, `x < 3` as (-infinity, 3); None if a side more than names something."""
    if sign in ("=", r"\in"):
        return right if _NAME.fullmatch(left_text) else None
    if sign[0] == "<" and _NAME.fullmatch(left_text):
        return ("(]" if "=" in sign else "()"), [read(r"-\infty", Budget()), right]
    if sign[0] == "<" and _NAME.fullmatch(right_text):
        return ("[)" if "=" in sign else "()"), [left, read(r"\infty", Budget())]
    return None


def match_relations(a: tuple, b: tuple, budget: Budget) -> bool:
    """The same sides, or left - right the same up to a factor, which an inequality needs positive."""
    if match(a[1], b[1], budget) and match(a[2], b[2], budget):
        return True
    if {side[0] for side in (*a[1:3], *b[1:3])} != {"value"}:
        return False
    (n, d), (m, e) = (difference(relation[1][1], relation[2][1], budget) for relation in (a, b))
    if n.keys() != m.keys() or not n.keys() - {()} or (a[0][0] == "<" and (d, e) != (ONE, ONE)):
        return False
    ratios = {n[monomial] / m[monomial] for monomial in n}
    return len(ratios) == 1 and (a[0][0] != "<" or ratios.pop() > 0)


def answer_key(answer: str) -> str:
    """A text that equal answers share, to count votes by; answers that share it are equal, units aside."""

    def key(tree: tuple) -> str:
        if tree[0] == "value":
            return canonical(tree[1])
        if isinstance(tree[1], list):
            parts = [key(part) for part in tree[1]]
            return f"{tree[0]}{sorted(parts) if tree[0] == 'list' else parts}"
        return "".join(tree[-1].split()) if tree[0] == "text" else f"{key(tree[1])} {tree[0]} {key(tree[2])}"

    try:
        return key(read(normalise(answer[:1000]), Budget()))
    except NoValue:
        return answer.strip()


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
