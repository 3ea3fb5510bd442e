"""|R|/L: where it is known, what noise adds to it, and how tokens are forced and followed."""

import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_model

import scope
from paper import tightness
from paper.one_step import draw_step
from rollout import sample
from support.config import load_config
from support.distributed import World
from train import set_up

# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize("size, rate", [(2, 0.3), (4, 0.0), (5, 0.7), (8, 0.15)])
def test_advantages_against_every_group_there_is(size, rate):
    """E|A| over all 2^(G-1) outcomes of the others, each group normalised by hand."""
    for reward, value in enumerate(tightness.expected_advantage(rate, size)):
        expected = 0.0
        for others in itertools.product((0, 1), repeat=size - 1):
            group = [reward, *others]
            if len(set(group)) > 1:
                chance = math.prod(rate if other else 1 - rate for other in others)
                distance = abs(reward - statistics.mean(group))
                expected += chance * distance / (statistics.stdev(group) + 1e-4)
        assert value == pytest.approx(expected, abs=1e-9)


def test_with_known_alpha_it_is_the_identity_of_appendix_a23():
    p = torch.tensor([0.55, 0.3, 0.1, 0.05], dtype=torch.float64)
    rates = torch.tensor([0.75, 0.25, 0.0, 1.0], dtype=torch.float64)
    levels = np.array([0.4, 2.1])
    rng = np.random.default_rng(0)
    for v in range(4):  # decompose_context is about the first token
        order = [v, *(u for u in range(4) if u != v)]
        successes = np.array([[j < 16 * rate for j in range(16)] for rate in rates[order]])
        results = [
            tightness.decompose_context(p[order].numpy(), successes, levels, rng) for _ in range(30)
        ]
        R, L, _, null = np.mean(results, axis=0)
        alpha = 0.4 + 1.7 * rates
        A_scale = (p * alpha).sum()
        assert L == pytest.approx(float(2 * A_scale * p[v] * (1 - p[v])), rel=1e-9)
        assert R / L == pytest.approx(scope.residual_ratio(p, alpha)[v].item(), rel=1e-9)
        # under the null every token has the rate of the context, and A_scale is the same
        assert null == pytest.approx(L, rel=0.02)


def simulate(rates: list[float]) -> np.ndarray:
    """Measure 400 contexts with these success rates of three tokens, p = 0.7, 0.2, 0.1."""
    rng = np.random.default_rng(5)
    p = np.array([0.7, 0.2, 0.1])
    contexts = []
    for _ in range(400):
        successes = rng.random((3, 32)) < np.array(rates)[:, None]
        contexts.append(tightness.decompose_context(p, successes, np.array([0.3, 1.8]), rng))
    return np.array(contexts)


def test_noise_is_told_from_coupling():
    """Where alpha is equal, |R| is all noise, and the null says so; else the ratio is exact."""
    problems = np.arange(400)
    ratio, _, _, null = tightness.tightness_ratio(simulate([0.3, 0.3, 0.3]), problems)
    assert ratio == pytest.approx(null, rel=0.1)
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    alpha = 0.3 + 1.5 * torch.tensor([0.5, 0.1, 0.1], dtype=torch.float64)
    exact = scope.residual_ratio(p, alpha)[0].item()
    ratio, low, high, null = tightness.tightness_ratio(simulate([0.5, 0.1, 0.1]), problems)
    assert ratio == pytest.approx(exact, rel=0.1) and ratio > 3 * null and low < exact < high


def test_ratio_and_its_interval_by_hand():
    """The bootstrap draws problems, so that contexts of one problem stay together."""
    contexts = np.array([[0.5, 1.0, 0.05, 1.0], [0.1, 0.5, 0.01, 0.5], [0.0, 0.5, 0.03, 0.5]])
    ratio, low, high, null = tightness.tightness_ratio(contexts, np.array([7, 3, 7]))
    assert (ratio, null) == pytest.approx((0.6 / 2, 0.09 / 2))
    # a quarter of the draws has problem 7 twice, and a quarter has problem 3 twice
    assert (low, high) == pytest.approx((0.1 / 0.5, 0.5 / 1.5))
    assert tightness.tightness_ratio(contexts, np.zeros(3))[:3] == pytest.approx((0.3, 0.3, 0.3))


# ---------------------------------------------------------------- forced tokens


def test_likely_tokens():
    probs = torch.tensor([0.05, 0.6, 0.005, 0.2, 0.045, 0.03, 0.025, 0.02, 0.015, 0.01])
    assert tightness.likely_tokens(probs, 3) == [3, 1, 0, 4, 5, 6, 7, 8]
    # and the sampled one, if it is not likely
    assert tightness.likely_tokens(probs, 2) == [2, 1, 3, 0, 4, 5, 6, 7, 8]


@pytest.fixture
def followed(prompts, monkeypatch):
    """Return rollouts of a tiny model with stop ids 1 and 5; the grader likes an even sum."""

    def even_sum(problem, text, grader):
        return sum(map(int, text.split())) % 2 == problem["remainder"]

    monkeypatch.setattr(tightness, "is_correct", even_sum)
    config = load_config(
        ["max_new_tokens=9", "temperature=0.9", "seed=3", "group_size=2", "rollout.segment=4"],
        {"continuations": 12},
    )
    model = tiny_model()
    run = SimpleNamespace(
        config=config,
        world=World(),
        policy=model,
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids))),
        stop=[1, 5],
    )
    return run, sample_one(run, prompts, list(range(12)), step=0)


def sample_one(run, prompts, rows, *, step, most=9):
    return sample(
        run.policy,
        prompts,
        rows,
        stop=[1, 5],
        max_new_tokens=most,
        temperature=0.9,
        seed=3,
        step=step,
    )


def test_next_token_probs_are_the_sampled_ones(followed):
    run, rollout = followed
    for row, t in rollout.mask.nonzero().tolist():
        probs = tightness.next_token_probs(run, rollout, row, t)
        assert probs.sum().item() == pytest.approx(1, abs=1e-5)
        sampled = probs[rollout.tokens[row, t]].log().item()
        assert sampled == pytest.approx(rollout.logprobs[row, t].item(), abs=1e-4)


def test_follow_grades_whole_completions_within_the_limit(followed):
    """Against single rows, sampled one by one with just the room that the limit leaves."""
    run, rollout = followed
    beginnings = [[], [7, 8], [9, 5], [6] * 8, [6] * 9, [8] * 5]
    prompt = rollout.prompts[4]
    correct = tightness.follow(run, {"remainder": 0}, prompt, beginnings, -3)
    assert correct.shape == (6, 12) and correct.dtype == bool
    for i, beginning in enumerate(beginnings):
        for j in range(12):
            ids = list(beginning)
            ended = beginning[-1:] == [5]
            if not ended and len(ids) < 9:
                rows = [i * 12 + j]
                one = sample_one(run, [prompt + ids], rows, step=-3, most=9 - len(ids))
                ids += one.tokens[0][one.mask[0]].tolist()
                ended = one.stopped[0].item()
            assert correct[i, j] == (ended and sum(ids) % 2 == 0), (i, j)
    assert 0 < correct[0].sum() < 12
    assert correct[2].all() and not correct[4].any()  # 9 + 5 is even; no stop within the limit


def test_measure_against_a_bandit(followed, monkeypatch):
    """The forced token alone decides: even ones win. alpha is then known, and so is |R|/L."""
    run, rollout = followed
    calls = []

    def bandit(run, problem, prompt, beginnings, step):
        calls.append((problem, prompt, beginnings, step))
        wins = [[ids[-1] % 2 == 0] * 16 for ids in beginnings[:-1]]
        return np.array([*wins, [j < 4 for j in range(16)]])  # the group succeeds at rate 1/4

    monkeypatch.setattr(tightness, "follow", bandit)
    failure, success = tightness.expected_advantage(0.25, 2)
    rng = np.random.default_rng(0)
    for row, t in rollout.mask.nonzero().tolist()[::7]:
        R, L, _, _ = tightness.measure_context(run, {}, rollout, row, t, rng, -9)
        _, prompt, (*forced, empty), step = calls.pop()
        before = rollout.tokens[row, :t].tolist()
        probs = tightness.next_token_probs(run, rollout, row, t)
        ids = tightness.likely_tokens(probs, int(rollout.tokens[row, t]))
        assert (prompt, empty, step) == (rollout.prompts[row], [], -9)
        assert forced == [[*before, v] for v in ids]
        p = probs[ids].double() / probs[ids].double().sum()
        alpha = [success if v % 2 == 0 else failure for v in ids]
        exact = scope.residual_ratio(p, torch.tensor(alpha, dtype=torch.float64))[0].item()
        assert R / L == pytest.approx(exact, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- the command


def test_command(in_tmp, small, capsys, monkeypatch):
    """The table again, from what was measured at the tokens of the step."""
    # some of the four contexts of a kind are of one problem
    few = ["prompts_per_step=4", "selection.fraction=0.5", "contexts=4", "continuations=3"]
    arguments = [*small, *few]
    measured = []
    problems = {}

    def record(run, problem, rollout, row, t, rng, step, measure=tightness.measure_context):
        result = measure(run, problem, rollout, row, t, rng, step)
        problems[row] = problem
        measured.append((row, t, step, *result))
        return result

    monkeypatch.setattr(tightness, "measure_context", record)
    tightness.main(arguments)
    text = Path("analyses/tightness.md").read_text()
    assert text in capsys.readouterr().out
    config = load_config(arguments, tightness.SETTINGS)
    of_row, rollout = draw_step(set_up(config, World(), Path("runs")), 0)  # the same step once more
    assert problems == {row: of_row[row] for row in problems}
    entropies = rollout.entropy[rollout.mask].sort(descending=True).values
    forking = rollout.mask & (rollout.entropy >= entropies[round(0.2 * len(entropies)) - 1])
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:]]
    parts = {"selected": (rollout.selected, measured[:4]), "forking": (forking, measured[4:])}
    for line, (kind, (mask, contexts)) in zip(lines, parts.items(), strict=True):
        places = {(row, t) for row, t, *_ in contexts}
        assert len(places) == 4 and all(mask[place] for place in places)
        assert len({step for _, _, step, *_ in contexts}) == 4 and max(contexts)[2] < -1
        R, L, null_R, null_L = np.array(contexts)[:, 3:].sum(axis=0)
        _, name, count, ratio, interval, null, _ = line
        low, high = map(float, interval.split(" to "))
        assert (name, count) == (kind, "4")
        assert [float(ratio), float(null)] == pytest.approx([R / L, null_R / null_L], abs=0.0006)
        groups = np.array([row // 4 for row, *_ in contexts])
        _, *ends, _ = tightness.tightness_ratio(np.array(contexts)[:, 3:], groups)
        assert [low, high] == pytest.approx(ends, abs=0.0006)
