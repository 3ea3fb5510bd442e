"""The Countdown check on a table of texts and on hostile ones; rewards against loops."""

import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import rewards
from data import random_chain
from rewards import REWARDS, grade, solves_countdown
from support.config import UserError

NUMBERS = [3, 5, 7, 2]

# ---------------------------------------------------------------- Countdown


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3*5=15, 15+7=22, 22+2=24", True),
        ("3 * 5 = 15 , 15 + 7 = 22 , 22 + 2 = 24", True),
        ("3*5=15,7+2=9,15+9=24", True),
        ("2-5=-3, 7--3=10, 10+3=13", False),  # valid steps, another target
        ("3*5=15, 15+9=24", False),  # 9 was not given
        ("3*5=15, 15+7=22", False),  # 2 is left over
        ("3*5=15, 15+7=22, 22+2=24, 24+0=24", False),  # a step too many
        ("5*5=25, 25-3=22, 22+2=24", False),  # 5 was given once
        ("3*5=15, 3+7=10, 10+2=12", False),  # 3 is used up
        ("the answer: 3*5=15, 15+7=22, 22+2=24", False),
        ("3*5=15, 15+7=22, 22+2=24 .", False),
        ("24", False),
        ("", False),
        (",,", False),
    ],
)
def test_countdown_table(text, expected):
    assert solves_countdown(text, NUMBERS, 24) is expected


@pytest.mark.parametrize(
    "text, target",
    [
        ("3+5=15, 15+7=22, 22+2=24", 24),
        ("5-3=15, 15+7=22, 22+2=24", 24),
        ("2-5=3, 3+7=10, 10+3=13", 13),  # the sign counts
        ("3*7=17, 17+5=22, 22+2=24", 24),
        ("7/2=3, 3*3=9, 9+5=14", 14),  # not a whole quotient
        ("7/2=4, 4*3=12, 12+5=17", 17),
        ("3*5=15, 15+7=22, 22+2=25", 25),  # a wrong last step
        ("3*5=15, 15+7=22, 22-2=24", 24),
        ("3*5=15, 15-7=8, 8*2=24", 24),
    ],
)
def test_a_wrong_step_does_not_count_even_if_the_chain_ends_at_the_target(text, target):
    assert not solves_countdown(text, NUMBERS, target)


def test_negative_values_and_division():
    assert solves_countdown("2-5=-3, 7--3=10, 10*3=30", NUMBERS, 30)
    assert solves_countdown("8/4=2, 2+1=3", [8, 4, 1], 3)
    assert not solves_countdown("8/0=0, 0+1=1", [8, 0, 1], 1)
    assert not solves_countdown("0/0=5, 5+1=6", [0, 0, 1], 6)


def test_the_numbers_are_not_changed():
    numbers = [3, 5]
    assert solves_countdown("3+5=8", numbers, 8)
    assert numbers == [3, 5]


def test_generated_chains_solve_their_problems_and_no_other_target():
    rng = random.Random(0)
    for _ in range(500):
        problem, chain = random_chain(rng, numbers=4, largest=20, limit=99)
        assert solves_countdown(chain, **problem)
        assert not solves_countdown(chain, problem["numbers"], problem["target"] + 1)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9=1, 1+1=2, 2+2=4",
        "9" * 100_000 + "+1=2, 1+1=2, 1+1=2",
        "," * 100_000,
        "(" * 100_000,
        "1+1=2" * 50_000,
        "٣*٥=١٥, 15+7=22, 22+2=24",
        " " * 100_000 + "x,1+1=2,1+1=2",
    ],
    ids=["tower", "long number", "commas", "parentheses", "no commas", "other digits", "blanks"],
)
def test_hostile_texts_are_wrong_at_once(text):
    started = time.process_time()
    assert not solves_countdown(text, NUMBERS, 24)
    assert time.process_time() - started < 1  # it takes a millisecond, or does not end


# ---------------------------------------------------------------- grading a rollout


def texts_of(monkeypatch, *texts, stopped):
    """Return arguments of `grade`: a tokenizer that decodes to these texts, problems, a rollout."""
    monkeypatch.setattr("rewards.decode", lambda tokenizer, rollout: list(texts))
    rollout = SimpleNamespace(mask=torch.ones(len(texts), 1), stopped=torch.tensor(stopped))
    return None, [{"numbers": [3, 5], "target": 8}] * len(texts), rollout


def test_a_truncated_completion_is_wrong(monkeypatch):
    arguments = texts_of(monkeypatch, "3+5=8", "3+5=8", "3*5=15", stopped=[True, False, True])
    correct, texts = grade(*arguments, "exact")
    assert correct.tolist() == [True, False, False]
    assert texts == ["3+5=8", "3+5=8", "3*5=15"]


def test_a_grader_that_raises_does_not_end_the_run(monkeypatch, capsys):
    def grader(problem, text, grader):
        if text == "bad":
            raise RecursionError("too deep")
        return True

    arguments = texts_of(monkeypatch, "good", "bad", stopped=[True, True])
    monkeypatch.setattr("rewards.is_correct", grader)
    assert grade(*arguments, "exact")[0].tolist() == [True, False]
    warning = capsys.readouterr().out
    assert "RecursionError: too deep" in warning
    assert "'bad'" in warning


def test_a_users_mistake_in_a_grader_does(monkeypatch):
    def grader(problem, text, grader):
        raise UserError("pip install math-verify")

    arguments = texts_of(monkeypatch, "good", stopped=[True])
    monkeypatch.setattr("rewards.is_correct", grader)
    with pytest.raises(UserError):
        grade(*arguments, "math_verify")


def test_a_graders_fingerprint_is_that_of_its_code(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "grading", tmp_path / "grading")
    shutil.copy(ROOT / "rewards.py", tmp_path)
    before = rewards.grader_fingerprint("exact")
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "rewards.py"))
    assert rewards.grader_fingerprint("exact") == before
    for file in ("rewards.py", "grading/latex.py"):
        with (tmp_path / file).open("a") as code:
            code.write("\n")
        assert rewards.grader_fingerprint("exact") != before
        before = rewards.grader_fingerprint("exact")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1")
    one = rewards.grader_fingerprint("math_verify")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2")
    assert rewards.grader_fingerprint("math_verify") != one


# ---------------------------------------------------------------- RLVR and RLIF


def test_verifiable_rewards_are_those_that_the_verdict_changes():
    for name, reward in REWARDS.items():
        record = {key: torch.rand(2, 3) for key in ("logprobs", "entropy", "self_certainty")}
        rollout = SimpleNamespace(mask=torch.ones(2, 3, dtype=torch.bool), **record)
        rollout.correct = torch.tensor([True, True])
        right = reward.function(rollout)
        rollout.correct = torch.tensor([False, False])
        assert reward.verifiable != torch.equal(right, reward.function(rollout)), name


def test_rewards_by_loops():
    """Whatever stands outside the mask does not count."""
    lengths = [3, 1, 5]
    generator = torch.Generator().manual_seed(0)
    rollout = SimpleNamespace(correct=torch.tensor([True, False, True]))
    rollout.mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rows = {}
    for name in ("logprobs", "entropy", "self_certainty"):
        values = torch.rand(3, 5, generator=generator).masked_fill(~rollout.mask, 7.0)
        setattr(rollout, name, values)
        rows[name] = [row[:length] for row, length in zip(values.tolist(), lengths)]
    expected = {
        "accuracy": [1.0, 0.0, 1.0],
        "self_certainty": [sum(row) / len(row) for row in rows["self_certainty"]],
        "token_entropy": [-sum(row) / len(row) for row in rows["entropy"]],
        "trajectory_likelihood": [sum(row) for row in rows["logprobs"]],
        "trajectory_entropy": [-sum(row) for row in rows["entropy"]],
    }
    assert expected.keys() == REWARDS.keys()
    for name, values in expected.items():
        assert REWARDS[name].function(rollout).tolist() == pytest.approx(values, rel=1e-6), name
