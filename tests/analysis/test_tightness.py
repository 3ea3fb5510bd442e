"""|R|/L: where it is known, what noise adds to it, how its tokens are forced and followed, and the command."""

import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ALONE

import data
import rollout
import scope
import step as steps
from analysis import tightness
from analysis.one_step import Step, analysis_keys, draw_step, settings_of
from support import config as configs

# ---------------------------------------------------------------- the estimate


def test_advantages_against_every_group_there_is():
    """E|A| over all 2^(G-1) outcomes of the others, each group normalised by hand."""
    for G, rate in ((2, 0.3), (4, 0.0), (5, 0.7), (8, 0.15)):
        table = tightness.advantage_table(G, eps=1e-4)
        for r in (0, 1):
            expected = 0.0
            for others in itertools.product((0, 1), repeat=G - 1):
                group = [r, *others]
                size = 0.0
                if len(set(group)) > 1:
                    size = abs(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
                chance = math.prod(rate if other else 1 - rate for other in others)
                assert table[r, sum(others)] == pytest.approx(size, abs=1e-9)
                expected += chance * size
            assert tightness.expected_advantage(rate, table)[r] == pytest.approx(expected, abs=1e-9)


def test_with_known_alpha_it_is_the_identity_of_appendix_a23():
    p, levels, rng = np.array([0.55, 0.3, 0.1, 0.05]), np.array([0.4, 2.1]), np.random.default_rng(0)
    successes = np.array([[j < count for j in range(16)] for count in (12, 4, 0, 16)])
    alpha = torch.from_numpy(levels[0] + (levels[1] - levels[0]) * np.array([0.75, 0.25, 0.0, 1.0]))
    ratios = scope.residual_ratio(torch.from_numpy(p), alpha)
    exact = scope.decompose(torch.from_numpy(p), alpha)
    for v in range(4):
        R, L, _, _ = tightness.decompose_context(p, v, successes, levels, rng)
        assert R / L == pytest.approx(ratios[v].item(), rel=1e-9)
        assert (L, R) == pytest.approx((exact.L[v].item(), abs(exact.R[v].item())), rel=1e-9)
        null = tightness.decompose_context(p, v, successes, levels, rng, draws=3000)[3]
        same = torch.full((4,), levels @ [1 - 0.5375, 0.5375])  # every token has the context's own rate
        assert null == pytest.approx(scope.decompose(torch.from_numpy(p), same).L[v].item(), rel=0.01)


def simulate(rates, *, contexts, M=32):
    """Contexts with these success rates for three tokens, p = 0.7 / 0.2 / 0.1, of the first token."""
    rng, p, levels = np.random.default_rng(5), np.array([0.7, 0.2, 0.1]), np.array([0.3, 1.8])
    return np.array([tightness.decompose_context(p, 0, rng.random((3, M)) < np.array(rates)[:, None], levels, rng)
                     for _ in range(contexts)])


def test_noise_is_told_from_coupling():
    """Where alpha is equal |R| is all noise, and the null says so; where it is not, the ratio is the exact one."""
    ones = np.ones((2, 400))
    ratio, _, _, null = tightness.tightness_ratio(simulate([0.3, 0.3, 0.3], contexts=400), ones)
    assert ratio == pytest.approx(null, rel=0.1)
    rates = torch.tensor([0.5, 0.1, 0.1], dtype=torch.float64)
    exact = scope.residual_ratio(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), 0.3 + 1.5 * rates)[0].item()
    ratio, _, _, null = tightness.tightness_ratio(simulate(rates.numpy(), contexts=400), ones)
    assert ratio == pytest.approx(exact, rel=0.1) and ratio > 3 * null


def test_ratio_and_its_interval_by_hand():
    """Weights count a context so often; a draw without L counts for nothing."""
    contexts = np.array([[0.5, 1.0, 0.05, 1.0], [0.1, 0.5, 0.01, 0.5], [0.0, 0.0, 0.0, 0.0]])
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3], [0, 3, 0]])
    ratio, low, high, null = tightness.tightness_ratio(contexts, weights)
    assert (ratio, null) == pytest.approx((0.6 / 1.5, 0.06 / 1.5))
    draws = [1.1 / 2.5, 0.2]
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_bootstrap_keeps_problems_together():
    weights = tightness.bootstrap_weights([4, 4, 9, 2], np.random.default_rng(0), draws=500)
    assert weights.shape == (501, 4) and (weights[0] == 1).all() and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[1:, 1:].sum(axis=1) == 3).all() and weights[1:].mean() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- forced tokens


def test_likely_tokens():
    probs = torch.tensor([0.05, 0.6, 0.005, 0.3, 0.045])
    assert tightness.likely_tokens(probs, 1, cover=0.9, most=8) == [1, 3]
    assert tightness.likely_tokens(probs, 1, cover=0.91, most=8) == [1, 3, 0]
    assert tightness.likely_tokens(probs, 1, cover=0.5, most=8) == [1, 3]  # at least 2, or nothing is compared
    assert tightness.likely_tokens(probs, 2, cover=0.999, most=3) == [1, 3, 0, 2]  # and the sampled one
    assert len(tightness.likely_tokens(probs, 2, cover=0.9999999, most=8)) == 5


def test_pick():
    """Places of the mask, no more than asked, none twice, in an order that the generator decides."""
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    every = {tuple(place) for place in mask.nonzero().tolist()}
    some, others = (tightness.pick(mask, 8, np.random.default_rng(seed)) for seed in (0, 1))
    assert len(set(some)) == len(some) == 8 and set(some) < every and some != others
    assert set(tightness.pick(mask, 100, np.random.default_rng(0))) == every
    assert tightness.pick(mask & False, 8, np.random.default_rng(0)) == []


class Letters:
    """A tokenizer for models whose tokens are numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture
def followed(model, prompts, monkeypatch):
    """Rollouts of a tiny model with stop ids 1 and 5, and a grader that likes an even sum."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: sum(map(int, text.split())) % 2 == problem)
    config = SimpleNamespace(max_new_tokens=9, temperature=0.9, seed=3, group_size=2,
                             reward=SimpleNamespace(grader="exact"), rollout=SimpleNamespace(batch_size=50, segment=4))
    sampled = rollout.sample(model, prompts, list(range(12)), stop=[1, 5], max_new_tokens=9, temperature=0.9, seed=3,
                             step=0)
    run = steps.Run(config, ALONE, model, Letters(), [1, 5], [0, 1] * 3)
    return Step(run, [0, 1] * 3, sampled, *[None] * 5), config


def test_next_token_probs_are_the_sampled_ones(followed):
    drawn, config = followed
    s = drawn.sampled
    places = s.mask.nonzero().tolist()
    sequences = [s.prompts[row] + s.tokens[row, :t].tolist() for row, t in places]
    probs = tightness.next_token_probs(drawn.run.policy, sequences, temperature=0.9, batch_size=7, world=ALONE)
    own = probs[torch.arange(len(places)), s.tokens[s.mask]]
    assert torch.allclose(probs.sum(dim=1), torch.ones(len(places)))
    assert torch.allclose(own.log(), s.logprobs[s.mask], atol=1e-4)


def test_follow_grades_whole_completions_within_the_limit(followed):
    """Against single rows, sampled one by one with just the room that the limit leaves."""
    drawn, config = followed
    branches = [(0, []), (3, [7, 8]), (4, [9, 5]), (7, [6] * 8), (9, [6] * 9), *((5, [8] * n) for n in range(3, 8))]
    count = 16
    correct = tightness.follow(drawn, branches, count, -3, config, ALONE)
    assert correct.shape == (10, count) and correct.dtype == bool
    for i, (row, begun) in enumerate(branches):
        for j in range(count):
            ids, ended = list(begun), begun[-1:] == [5]
            if not ended and len(begun) < 9:
                one = rollout.sample(drawn.run.policy, [drawn.sampled.prompts[row] + begun], [i * count + j],
                                     stop=[1, 5], max_new_tokens=9 - len(begun), temperature=0.9, seed=3, step=-3)
                ids, ended = ids + one.tokens[0][one.mask[0]].tolist(), one.stopped[0].item()
            assert correct[i, j] == (ended and sum(ids) % 2 == row // 2 % 2), (i, j)
    assert correct.any() and not correct[4].any()  # row 9 filled the limit: truncated
    assert correct[2].all() == (14 % 2 == 4 // 2 % 2)


def test_measure_against_a_bandit(followed, monkeypatch):
    """The forced token alone decides: even ones win. alpha is then known, and |R|/L is the identity's."""
    drawn, config = followed
    config.cover, config.most, config.continuations, config.others = 0.95, 5, 4, 8
    config.grpo = SimpleNamespace(advantage_eps=1e-4)
    calls = []

    def bandit(drawn, branches, count, step, config, world):
        calls.append((step, count, branches))
        if step == tightness.OTHERS:  # the success rate of problem g is g / 8
            return np.array([[j < row // 2 for j in range(count)] for row, _ in branches])
        return np.array([[ids[-1] % 2 == 0] * count for _, ids in branches])

    monkeypatch.setattr(tightness, "follow", bandit)
    places = [(2, 0), (11, 1), (3, 2), (8, 0), (9, 1)]
    places = [place for place in places if drawn.sampled.mask[place]]
    measured = tightness.measure(drawn, places, config, np.random.default_rng(0), ALONE)
    (plain, others, problems), (forced, continuations, branches) = calls
    assert (plain, forced, others, continuations) == (tightness.OTHERS, tightness.FORCED, 8, 4) and len(places) >= 3
    assert tightness.OTHERS != tightness.FORCED and max(tightness.OTHERS, tightness.FORCED) < -1
    assert problems == [(row, []) for row in dict.fromkeys(row - row % 2 for row, _ in places)]
    table = tightness.advantage_table(2, eps=1e-4)
    for (row, t), (R, L, _, _), left_out in zip(places, *measured):
        begun = drawn.sampled.tokens[row, :t].tolist()
        probs = tightness.next_token_probs(drawn.run.policy, [drawn.sampled.prompts[row] + begun], temperature=0.9,
                                           batch_size=1, world=ALONE)[0]
        token = int(drawn.sampled.tokens[row, t])
        ids = tightness.likely_tokens(probs, token, cover=0.95, most=5)
        assert branches[: len(ids)] == [(row, [*begun, v]) for v in ids]
        del branches[: len(ids)]
        low, high = tightness.expected_advantage((row // 2) / 8, table)
        alpha = torch.tensor([high if v % 2 == 0 else low for v in ids], dtype=torch.float64)
        p = probs[ids].double()
        assert left_out == pytest.approx(1 - p.sum().item(), abs=1e-6)
        exact = scope.residual_ratio(p / p.sum(), alpha)[ids.index(token)].item()
        assert R / L == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert not branches


# ---------------------------------------------------------------- the command


def test_command(in_tmp, small, capsys, monkeypatch):
    """The table's numbers again, from what was measured at the tokens of the step."""
    arguments = [*small, "contexts=12", "continuations=3", "others=6", "cover=0.2", "most=3", "temperature=0.3"]
    calls, picks = [], []

    def record(*arguments, measure=tightness.measure):
        calls.append((arguments[1], *measure(*arguments)))
        return calls[0][1:]

    def record_pick(*arguments, pick=tightness.pick):
        picks.append(pick(*arguments))
        return picks[-1]

    monkeypatch.setattr(tightness, "pick", record_pick)
    monkeypatch.setattr(tightness, "measure", record)
    tightness.main(arguments)
    printed = capsys.readouterr().out
    ((places, contexts, left_out),) = calls
    assert Path("analyses/tightness.md").read_text() in printed and f"{left_out.max():.4f} at most" in printed
    drawn = draw_step(settings_of(analysis_keys(arguments, tightness.KEYS, {})), ALONE)  # the same draws once more
    positive = drawn.sampled.mask & (drawn.advantages[:, None] > 0)
    kinds = dict(zip(tightness.KINDS, (drawn.selected, positive & ~drawn.selected, drawn.forking)))
    text = Path("analyses/tightness.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()[2:5]]
    assert [line[0] for line in lines] == list(kinds)
    for mask, chosen, line in zip(kinds.values(), picks, lines):
        assert all(mask[place] for place in chosen) and len(set(chosen)) == len(chosen) == min(12, int(mask.sum()))
        some = [places.index(place) for place in chosen]
        p = torch.stack([drawn.sampled.logprobs[place].exp() for place in chosen])
        R, L, null_R, null_L = contexts[some].sum(axis=0)
        low, high = map(float, line[5].split(" to "))
        assert [float(number) for number in line[1:5]] == pytest.approx(
            [len(chosen), p.mean().item(), (1 - 2 * p).abs().mean().item(), R / L], abs=0.0006)
        assert float(line[6]) == pytest.approx(null_R / null_L, abs=0.0006)
        assert low <= R / L + 0.001 and R / L - 0.001 <= high


def test_needs_successes(in_tmp, small, monkeypatch):
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: False)
    with pytest.raises(configs.UserError, match="selected, positive, unselected: raise group_size"):
        tightness.main(small)


@pytest.mark.parametrize("arguments, words", [
    (["continuations=1"], "continuations=1"), (["group_size=1"], "group_size=1"), (["contexts=0"], "contexts=0"),
    (["others=0"], "others=0"), (["most=1"], "most=1"), (["cover=1.0"], "cover=1.0"), (["cover=0.0"], "cover=0.0"),
    (["reward=token_entropy"], "reward"), (["shown=3"], "unknown config key")])
def test_bad_input(tmp_path, monkeypatch, small, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(configs.UserError) as error:
        tightness.main([*small, *arguments])
    assert words in str(error.value) and "\n" not in str(error.value)
