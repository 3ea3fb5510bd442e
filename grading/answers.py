"""Where a text holds its final answer: a completion in its last \\boxed{}, a problem's field in its owner's way."""

import json
import math
import re

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


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


def gold_answer(value, name: str) -> str:
    """The final answer in a field: after GSM8K's last ####, in MATH's last \\boxed{}, or the field as it stands."""
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(int(value)) if value == int(value) else repr(value)  # 27.0 is 27
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be text or a number, not {json.dumps(value)[:40]}')
    if "####" in value:
        return value.rpartition("####")[2].strip()
    if r"\boxed" in value or name == "solution":  # a solution's prose is no answer
        return (extract_answer(value) or "").strip()
    return value.strip()
