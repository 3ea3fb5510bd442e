r"""Finds the final answer in a text: a completion's last \boxed{}, or a data set's answer field."""

import json
import math
import re
from decimal import Decimal

TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{} whose braces balance, None if there is none.

    Only the last 20,000 characters are looked at, which bounds the work.

    >>> extract_answer(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}, or even \boxed{3")
    '\\frac{1}{2}'
    """
    text = text[-20_000:]
    answer = None
    answer_start = -1
    open_braces = []  # for each, the start of the content of its box; -1 if it opens none
    for token in TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(-1)
        elif token[0].startswith(r"\boxed"):
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start > answer_start:
                answer_start = start
                answer = text[start : token.start()]
    return answer


def gold_answer(value, name: str) -> str:
    r"""Return the final answer in a data set's field of this name, "" if there is none.

    It is the content of MATH's last \boxed{}, what follows GSM8K's #### on the last line, or the
    whole field. Raises ValueError if the field is neither text nor a number.
    """
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return f"{Decimal(repr(value)):f}".removesuffix(".0")  # 27.0 is 27, 2.5e-05 is 0.000025
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be text or a number, not {json.dumps(value)[:40]}')
    answer = extract_answer(value)
    last_line = value.strip().rpartition("\n")[2]
    if answer is None and "####" in last_line:  # in other lines it is a heading of Markdown
        answer = last_line.rpartition("####")[2]
    elif answer is None and r"\boxed" not in value and name != "solution":
        answer = value  # the prose of a solution, or an open box, is no answer
    return (answer or "").strip()
