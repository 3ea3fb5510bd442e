"""Rewards: what a completion is worth, by a grader (RLVR) or by the model's own confidence (RLIF).

RLVR's grader looks at the completion's text, never at the prompt. RLIF's rewards are read off what the sampler recorded
of every drawn token; they carry no gradient and never see `correct`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from grading import GRADERS, answer_key, extract_answer, is_equal

__all__ = ["GRADERS", "REWARDS", "Reward", "answer_key", "extract_answer", "is_equal", "solves_countdown"]

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


class Reward(NamedTuple):
    """What a completion earns; see REWARDS."""

    function: Callable[[Tensor, Any], Tensor]  # (correct bool [B], rollout with [B, C] records) -> [B]
    verifiable: bool = False  # made of the grader's verdict, so labels are needed


REWARDS = {
    "accuracy": Reward(accuracy, verifiable=True),
    "self_certainty": Reward(self_certainty),
    "token_entropy": Reward(token_entropy),
    "trajectory_likelihood": Reward(trajectory_likelihood),
    "trajectory_entropy": Reward(trajectory_entropy),
}
