"""The Countdown reward: a table of texts, and bounded work on hostile ones. Which rewards need labels."""

import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model

import rewards
import rollout
from data import random_chain
from rewards import REWARDS, solves_countdown

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
)
def test_hostile_texts_are_wrong_at_once(text):
    started = time.process_time()
    assert not solves_countdown(text, NUMBERS, TARGET)
    assert time.process_time() - started < 1  # a millisecond, or without end


def test_verifiable_rewards_are_those_that_the_verdict_changes():
    records = {name: torch.rand(2, 3) for name in ("logprobs", "entropy", "self_certainty")}
    sampled = SimpleNamespace(mask=torch.ones(2, 3, dtype=torch.bool), **records)
    right, wrong = torch.tensor([True, True]), torch.tensor([False, False])
    for name, reward in REWARDS.items():
        assert reward.verifiable != torch.equal(reward.function(right, sampled), reward.function(wrong, sampled)), name


# ---------------------------------------------------------------- RLVR and RLIF


def record(values, lengths):
    """[B, C] with zeros past each row's length, and its mask."""
    width = max(lengths)
    padded = torch.tensor([row + [0.0] * (width - len(row)) for row in values])
    mask = torch.tensor([[t < length for t in range(width)] for length in lengths])
    return padded, mask


def test_rewards_by_loops():
    lengths = [3, 1, 5]
    generator = torch.Generator().manual_seed(0)
    rows = {name: [torch.rand(n, generator=generator).tolist() for n in lengths]
            for name in ("logprobs", "entropy", "self_certainty")}
    padded = {name: record(values, lengths)[0] for name, values in rows.items()}
    sampled = SimpleNamespace(mask=record(rows["entropy"], lengths)[1], **padded)
    correct = torch.tensor([True, False, True])
    expected = {
        "accuracy": [1.0, 0.0, 1.0],
        "self_certainty": [sum(row) / len(row) for row in rows["self_certainty"]],
        "token_entropy": [-sum(row) / len(row) for row in rows["entropy"]],
        "trajectory_likelihood": [sum(row) for row in rows["logprobs"]],
        "trajectory_entropy": [-sum(row) for row in rows["entropy"]],
    }
    assert expected.keys() == REWARDS.keys()
    for name, values in expected.items():
        assert REWARDS[name].function(correct, sampled).tolist() == pytest.approx(values, rel=1e-6), name


def test_self_certainty_is_aligned_with_the_drawn_tokens():
    """A three-token completion: the distributions *before* each token count, the one after the last does not."""
    model = tiny_model()
    sampled = rollout.sample(model, [[7, 3, 9]], [0], stop=[1], max_new_tokens=3, seed=0, step=0)
    completion = sampled.tokens[0].tolist()
    total = 0.0
    for t in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([[7, 3, 9] + completion[:t]])).logits[0, -1].double().tolist()
        log_z = math.log(sum(math.exp(z) for z in logits))
        total += sum((1 / 40) * (math.log(1 / 40) - (z - log_z)) for z in logits)
    reward = rewards.self_certainty(torch.tensor([False]), sampled)
    assert sampled.mask.sum() == 3 and reward.item() == pytest.approx(total / 3, rel=1e-4)
