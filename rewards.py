"""Rewards say what a completion is worth: by a grader, or by the model's own confidence.

In RLVR (RL with verifiable rewards) a grader reads the text of the completion, never the prompt. In
RLIF (RL from internal feedback) rewards are computed from what the sampler recorded of every token;
they carry no gradient and do not depend on whether the completion is correct.
"""

import importlib.metadata
import importlib.util
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from grading import GRADERS, GraderError, extract_answer, is_equal
from rollout import Rollout, decode
from support.config import UserError, lookup, require

__all__ = [
    "REWARDS",
    "Reward",
    "extract_answer",
    "grade",
    "is_correct",
    "is_equal",
    "solves_countdown",
]

# One step of a Countdown chain, a op b = c.
STEP = re.compile(r"\s*(-?\d{1,9})\s*([-+*/])\s*(-?\d{1,9})\s*=\s*(-?\d{1,9})\s*", re.ASCII)

# ---------------------------------------------------------------- graders


def solves_countdown(text: str, numbers: list[int], target: int) -> bool:
    """Return whether a chain of steps uses each number once and ends at the target.

    A step `a op b = c` takes a and b from the numbers that are left and puts c among them; its
    arithmetic must hold in whole numbers. The time is linear in the length of the text: there
    is no `eval`, and numbers have at most 9 digits.

    >>> solves_countdown("3*5=15, 15+7=22, 22+2=24", [3, 5, 7, 2], 24)
    True
    >>> solves_countdown("3*5=15, 15+9=24", [3, 5, 7, 2], 24)  # 9 was not given, 7 and 2 are left
    False
    """
    left = list(numbers)
    if len(numbers) == 1:
        return not text.strip() and left == [target]
    # a valid chain has len(numbers) - 1 steps, so a longer text need not be split to its end
    steps = text.split(",", len(numbers))
    if len(steps) != len(numbers) - 1:
        return False
    for step in steps:
        match = STEP.fullmatch(step)
        if match is None:
            return False
        a, b, c = int(match[1]), int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in left:
                return False
            left.remove(operand)
        holds = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and b * c == a}
        if not holds[match[2]]:
            return False
        left.append(c)
    return left == [target]


def check_grader(grader: str) -> None:
    """Raise UserError if there is no such grader, or if its library is not installed."""
    lookup("grader", grader, GRADERS)
    require(
        grader != "math_verify" or importlib.util.find_spec("math_verify") is not None,
        "grader=math_verify: pip install math-verify, or leave grader out",
    )


def is_correct(problem: dict, text: str, grader: str) -> bool:
    """Return whether a completion solves its problem."""
    if "numbers" in problem:
        return solves_countdown(text, problem["numbers"], problem["target"])
    try:
        return GRADERS[grader](text, problem["answer"])
    except GraderError as error:
        raise UserError(f"grader={grader}: {error}") from None


def grader_fingerprint(grader: str) -> str:
    """Return a checksum of the code that grades, and of the version of math_verify.

    It keeps stored verdicts of another grader from being used.
    """
    folder = Path(__file__).parent
    value = 0
    for file in [folder / "rewards.py", *sorted((folder / "grading").glob("*.py"))]:
        value = zlib.crc32(file.read_bytes(), value)
    if grader == "math_verify":
        value = zlib.crc32(importlib.metadata.version("math-verify").encode(), value)
    return f"{grader}-{value:08x}"


def grade(
    tokenizer, problems: list[dict], rollout: Rollout, grader: str
) -> tuple[Tensor, list[str]]:
    """Return whether each completion is correct, bool [B], and the texts of the completions.

    A truncated completion counts as wrong. So does one at which the grader raises, because one
    completion must not end a long run.
    """
    texts = decode(tokenizer, rollout)
    verdicts = []
    for problem, text in zip(problems, texts):
        try:
            verdicts.append(is_correct(problem, text, grader))
        except UserError:
            raise
        except Exception as error:
            verdicts.append(False)
            tqdm.write(
                f"warning: the grader raised {type(error).__name__}: {error}, for the "
                f"completion {text[-200:]!r}"
            )
    return torch.tensor(
        verdicts, dtype=torch.bool, device=rollout.mask.device
    ) & rollout.stopped, texts


# ---------------------------------------------------------------- RLVR and RLIF


def accuracy(rollout: Rollout) -> Tensor:
    """Return 1 for a correct completion, else 0: the verifiable reward.  [B]"""
    return rollout.correct.float()


def self_certainty(rollout: Rollout) -> Tensor:
    """Return the mean over tokens of KL(uniform || policy).  [B]  Intuitor, Zhao et al. 2025"""
    return mean_over_tokens(rollout.self_certainty, rollout.mask)


def token_entropy(rollout: Rollout) -> Tensor:
    """Return minus the mean entropy over tokens.  [B]  RENT, Prabhudesai et al. 2025"""
    return -mean_over_tokens(rollout.entropy, rollout.mask)


def trajectory_likelihood(rollout: Rollout) -> Tensor:
    """Return sum_t log pi(y_t), which favours short completions.  [B]

    EM-RL-sequence, Agarwal et al. 2025.
    """
    return (rollout.logprobs * rollout.mask).sum(dim=1)


def trajectory_entropy(rollout: Rollout) -> Tensor:
    """Return -sum_t H_t, which favours short completions too.  [B]

    EM-RL-token, Agarwal et al. 2025.
    """
    return -(rollout.entropy * rollout.mask).sum(dim=1)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each row's valid tokens.  [B, C], bool [B, C] -> [B]"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


class Reward(NamedTuple):
    """Describes one reward."""

    function: Callable[[Rollout], Tensor]  # -> [B]
    verifiable: bool = False  # the function uses rollout.correct, so it needs labels


REWARDS = {
    "accuracy": Reward(accuracy, verifiable=True),
    "self_certainty": Reward(self_certainty),
    "token_entropy": Reward(token_entropy),
    "trajectory_likelihood": Reward(trajectory_likelihood),
    "trajectory_entropy": Reward(trajectory_entropy),
}
