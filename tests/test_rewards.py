"""The Countdown reward: a table of texts, and bounded work on hostile ones."""

import random
import time

import pytest

from data import random_chain
from rewards import solves_countdown

NUMBERS, TARGET = [3, 5, 7, 2], 24


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3*5=15, 15+7=22, 22+2=24", True),
        ("3 * 5 = 15 , 15 + 7 = 22 , 22 + 2 = 24", True),
        ("3*5=15,7+2=9,15+9=24", True),
        ("2-5=-3, 7--3=10, 10+3=13", False),  # valid steps, another target
        ("3*5=16, 16+7=23, 23+2=25", False),  # 3*5 is 15
        ("3*5=15, 15+9=24", False),  # 9 was not given
        ("3*5=15, 15+7=22", False),  # 2 is left over
        ("3*5=15, 15+7=22, 22+2=24, 24+0=24", False),  # a step too many
        ("5*5=25, 25-3=22, 22+2=24", False),  # 5 was given once
        ("3*5=15, 3+7=10, 10+2=12", False),  # 3 is used up
        ("7/2=3, 3*5=15, 15+3=18", False),  # not a whole quotient
        ("the answer: 3*5=15, 15+7=22, 22+2=24", False),
        ("3*5=15, 15+7=22, 22+2=24 .", False),
        ("24", False),
        ("", False),
        (",,", False),
    ],
)
def test_countdown_table(text, expected):
    assert solves_countdown(text, NUMBERS, TARGET) is expected


def test_negative_values_and_division():
    assert solves_countdown("2-5=-3, 7--3=10, 10*3=30", [3, 5, 7, 2], 30)
    assert solves_countdown("8/4=2, 2+1=3", [8, 4, 1], 3)
    assert not solves_countdown("8/0=0, 0+1=1", [8, 0, 1], 1)
    assert not solves_countdown("0/0=5, 5+1=6", [0, 0, 1], 6)


def test_the_numbers_are_not_changed():
    numbers = [3, 5]
    assert solves_countdown("3+5=8", numbers, 8) and numbers == [3, 5]


def test_generated_chains_solve_their_problems_and_no_other_target():
    rng = random.Random(0)
    for _ in range(500):
        problem, chain = random_chain(rng, numbers=4, largest=20, limit=99)
        assert solves_countdown(chain, **problem)
        assert not solves_countdown(chain, problem["numbers"], problem["target"] + 1)


@pytest.mark.parametrize(
    "text",
    ["9**9**9**9=1, 1+1=2, 2+2=4", "9" * 100_000 + "+1=2, 1+1=2, 1+1=2", "," * 100_000, "(" * 100_000,
     "1+1=2" * 50_000, "٣*٥=١٥, 15+7=22, 22+2=24", " " * 100_000 + "x,1+1=2,1+1=2"],
    ids=["tower", "long number", "commas", "parentheses", "no commas", "other digits", "blanks"],
)  # fmt: skip
def test_hostile_texts_are_wrong_at_once(text):
    started = time.perf_counter()
    assert not solves_countdown(text, NUMBERS, TARGET)
    assert time.perf_counter() - started < 0.05
