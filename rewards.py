"""Rewards: what a completion is worth. Verifiable rewards look at its text, never at the prompt."""

import re

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
