"""Runs that are killed before a file operation, and graders under hostile texts."""

import random
import subprocess
import sys

import pytest
from helpers import ROOT

from rewards import answer_of, is_correct

PIECES = [
    "\\frac{1}{",
    "(",
    ")",
    "^",
    "{",
    "}",
    "\\sqrt{",
    "9",
    "1/",
    "-",
    ",",
    "\\boxed{",
    "x=",
    " ",
]


def hostile_text(rng: random.Random) -> str:
    """Return a text of random or repeated pieces, within a box, an open box or no box."""
    size = rng.choice([3, 30, 3000])
    piece = rng.choice(PIECES)
    text = rng.choice(
        [
            "".join(rng.choices(PIECES, k=size // 2)),
            (piece + rng.choice(PIECES)) * (size // 2),
            "".join(rng.choices("0123456789abcxyz +-*/^=(){}\\,.", k=size)),
        ]
    )
    return rng.choice([text, rf"\boxed{{{text}}}", rf"\boxed{{{text}"])


@pytest.mark.parametrize("problem", [{"problem": "?"}, {"numbers": [1, 2, 3], "target": 6}])
def test_graders_raise_nothing_under_hostile_texts(problem):
    rng = random.Random(0)
    for _ in range(300):
        problem["answer"] = hostile_text(rng)[:300]
        text = hostile_text(rng)
        assert is_correct(problem, text, "exact") in (True, False)
        assert isinstance(answer_of(problem, text), str)


def test_runs_that_are_killed_resume_to_the_same_result():
    """The short form of `python tests/faults.py 79`, which kills before every file operation."""
    command = [sys.executable, ROOT / "tests" / "faults.py", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "4 kills" in result.stdout
