"""|R|/L: where it is known, what noise adds to it, how its tokens are forced and followed, and the command."""

import itertools
import json
import math
import re
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
from analysis import tightness_report as report
from analysis.one_step import Step, analysis_keys, draw_step, settings_of
from analysis.tightness import Residual
from support import config as configs

# ---------------------------------------------------------------- the estimate


def test_advantages_against_every_group_there_is():
    """E|A| over all 2^(G-1) outcomes of the others, each group normalised by hand."""
    for G, rate in ((2, 0.3), (4, 0.0), (5, 0.7), (8, 0.15)):
        table = tightness.advantage_table(G)
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


def table_of(successes: list[int], M: int) -> np.ndarray:
    """Continuations of which so many succeed, in the same number in both halves."""
    return np.array([[j % (M // 2) < s // 2 for j in range(M)] for s in successes])


def test_residual_with_known_alpha_is_the_identity_of_appendix_a23():
    p, levels, rng = np.array([0.55, 0.3, 0.1, 0.05]), np.array([0.4, 2.1]), np.random.default_rng(0)
    successes = table_of([12, 4, 0, 16], 16)
    alpha = torch.from_numpy(levels[0] + (levels[1] - levels[0]) * np.array([0.75, 0.25, 0.0, 1.0]))
    ratios = scope.residual_ratio(torch.from_numpy(p), alpha)
    exact = scope.decompose(torch.from_numpy(p), alpha)
    for v in range(4):
        found = tightness.residual(p, v, successes, levels, rng)
        assert abs(found.R) / found.L == pytest.approx(ratios[v].item(), rel=1e-9)
        assert (found.L, found.R) == pytest.approx((exact.L[v].item(), exact.R[v].item()), rel=1e-9)
        assert found.RR == pytest.approx(found.R**2, rel=1e-9)  # both halves are the same here
        assert found.null_L.shape == found.null_R.shape == (100,)
        null = tightness.residual(p, v, successes, levels, rng, draws=3000)  # every token has the context's own rate
        same = torch.full((4,), levels @ [1 - 0.5375, 0.5375])
        assert null.null_L.mean() == pytest.approx(scope.decompose(torch.from_numpy(p), same).L[v].item(), rel=0.01)


def simulate(rates, *, contexts, M=32):
    """Contexts with these success rates for three tokens, p = 0.7 / 0.2 / 0.1, of the first token."""
    rng, p, levels = np.random.default_rng(5), np.array([0.7, 0.2, 0.1]), np.array([0.3, 1.8])
    return [tightness.residual(p, 0, rng.random((3, M)) < np.array(rates)[:, None], levels, rng)
            for _ in range(contexts)]


def test_noise_is_told_from_coupling():
    """Where alpha is equal |R| is all noise: the floor says so, and the corrected estimate is about 0."""
    rows = simulate([0.3, 0.3, 0.3], contexts=400)
    estimates = tightness.summarise(rows, np.ones((1, 400)))
    assert estimates["mean"][0] == pytest.approx(estimates["mean_floor"][0], rel=0.1)
    assert estimates["sums"][0] == pytest.approx(estimates["sums_floor"][0], rel=0.1)
    products = np.array([row.RR for row in rows])
    assert abs(products.mean()) < 4 * products.std() / 20

    rates = torch.tensor([0.5, 0.1, 0.1], dtype=torch.float64)
    exact = scope.residual_ratio(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), 0.3 + 1.5 * rates)[0].item()
    estimates = tightness.summarise(simulate(rates.numpy(), contexts=400), np.ones((1, 400)))
    assert estimates["rms_corrected"][0] == pytest.approx(exact, rel=0.05)
    assert estimates["mean"][0] == pytest.approx(exact, rel=0.1)
    assert estimates["mean"][0] > 3 * estimates["mean_floor"][0]


def made_up(L, R) -> Residual:
    return Residual(L, R, R * R, np.full(10, L), np.full(10, 0.1 * R))


def test_summary_by_hand():
    """Weights count a context so often; a context without L has no ratio."""
    rows = [made_up(1.0, -0.5), made_up(0.5, 0.1), made_up(0.0, 0.0)]
    estimates = tightness.summarise(rows, np.array([[1, 1, 1], [2, 1, 0], [0, 0, 1]]))
    assert estimates["mean"][:2] == pytest.approx([(0.5 + 0.2) / 2, (0.5 + 0.5 + 0.2) / 3])
    assert estimates["mean_floor"][0] == pytest.approx(0.035)
    assert estimates["sums"][:2] == pytest.approx([0.6 / 1.5, 1.1 / 2.5])
    assert estimates["sums_floor"][:2] == pytest.approx([0.06 / 1.5, 0.11 / 2.5])
    assert estimates["rms_corrected"][0] == pytest.approx(math.sqrt((0.25 + 0.04) / 2))
    assert np.isnan(estimates["mean"][2])
    assert report.with_error(np.array([3.0, 1.0, 2.0, np.nan])) == (3.0, 0.5)


def test_bootstrap_keeps_problems_together():
    weights = tightness.bootstrap_weights([4, 4, 9, 2], np.random.default_rng(0), draws=500)
    assert weights.shape == (501, 4) and (weights[0] == 1).all() and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[1:, 1:].sum(axis=1) == 3).all() and weights[1:].mean() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("selected, forking, in_play, words", [
    (0.1, 0.3, 0.4, "bears A.23 out"), (0.1, 0.1, 0.3, "does not bear A.23 out"), (0.4, 0.1, 0.3, "contradicts A.23"),
    (0.2, 0.2, 0.2, "does not bear A.23 out"), (0.1, 0.3, None, "bears A.23 out"),
    (0.2, 0.3, 0.1, "does not bear A.23 out")])
def test_verdict_falls_as_the_numbers_do(selected, forking, in_play, words):
    rng, sizes = np.random.default_rng(0), (selected, 0.7, forking, in_play)
    kinds = {}
    for kind, size in zip((*report.KINDS, report.IN_PLAY), sizes):
        if size is not None:
            rows = [made_up(1.0, size + 0.05 * rng.standard_normal()) for _ in range(30)]
            kinds[kind] = tightness.summarise(rows, tightness.bootstrap_weights(range(30), rng))
    told = report.verdict(kinds)
    assert f", which {words}; at unselected" in told
    relation = {-1: "smaller than", 0: "not measurably different from", 1: "larger than"}[np.sign(selected - forking)]
    assert f"{relation} {kinds['forking']['mean'][0]:.3f} (" in told
    assert told.count("[difference") == 2 - (in_play is None)


def test_tables_by_hand():
    """Four contexts: one without L, one whose tokens fared the same, two with a ratio of 0.5 and of 0.2."""
    rows = [made_up(1.0, -0.5), made_up(0.5, 0.1), made_up(0.0, 0.0), made_up(2.0, 0.0)]
    p, every = np.array([0.2, 0.95, 0.5, 0.25]), np.array([True] * 4)
    estimates = tightness.summarise(rows, np.ones((3, 4)))
    few = tightness.summarise(rows[:1], np.ones((3, 1)))
    first = np.array([True, False, False, False])
    told = report.tightness_tables({"all of them": estimates, "one": few}, {("one", 0.1, 0.3): (few, 1)}, rows,
                                   {"all of them": every, "one": first}, p, [0.0, 0.01, 0.03, 0.0])
    head, line, one, _, bins, *lines = told.splitlines()
    assert re.split("  +", line.strip()) == [
        "all of them", "4", "1", "1", "0.475", "0.500",
        "0.233 ±0.000 (0.023)", f"{math.sqrt(0.29 / 3):.3f} ±0.000", "0.171 ±0.000 (0.017)"]
    assert re.split("  +", one.strip())[:6] == ["one", "1", "0", "0", "0.200", "0.600"]
    assert re.split("  +", lines[1].strip()) == ["0.1 - 0.3", "-", "0.500 ±0.000 (0.050) n=1"]
    assert re.split("  +", lines[4].strip()) == ["0.9 - 1", "-", "-"]
    assert "mean 0.0100, largest 0.0300" in told


def test_picture():
    """A point a context for the three kinds, three bars a kind, and the noise alone as a dashed line on two of them."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, p = [made_up(1.0, -0.5), made_up(0.5, 0.1)], np.array([0.2, 0.9])
    members = {kind: np.array([i > 0, True]) for i, kind in enumerate((*report.KINDS, report.IN_PLAY))}
    by_kind = {kind: tightness.summarise([rows[0], rows[1]], np.ones((3, 2))) for kind in members}
    figure = report.draw_tightness(pyplot, p, np.array([0.5, 0.2]), members, by_kind)
    left, right = figure.axes
    assert np.allclose(left.lines[0].get_xydata(), [[0.9, 0.2]])
    assert np.allclose(left.lines[2].get_xydata(), [[0.2, 0.5], [0.9, 0.2]])
    assert len(left.lines) == 4 and np.allclose(left.lines[3].get_ydata()[[0, 100, 200]], [0.5, 0, 0.5])
    heights = [by_kind["forking"][name][0] for name in ("mean", "rms_corrected", "sums")]
    assert [bar.get_height() for bar in right.patches] == pytest.approx(heights * 4)
    dashed = [line.get_ydata()[0] for line in right.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([by_kind["forking"][f"{name}_floor"][0] for name in ("mean", "sums")] * 4)
    pyplot.close(figure)


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
    table = tightness.advantage_table(2)
    for (row, t), (residual, left_out) in zip(places, measured):
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
        assert abs(residual.R) / residual.L == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert not branches


# ---------------------------------------------------------------- the command


def test_command(in_tmp, small, capsys, monkeypatch):
    arguments = [*small, "contexts=12", "continuations=3", "others=6", "cover=0.2", "most=3", "temperature=0.3"]
    edges, bootstraps = (0.0, 0.007, 0.012, 0.02, 1.0), []  # an untrained model's p are small
    for module in (tightness, report):
        monkeypatch.setattr(module, "EDGES", edges)
    monkeypatch.setattr(tightness, "bootstrap_weights", lambda problems, rng, draw=tightness.bootstrap_weights:
                        bootstraps.append((problems, draw(problems, rng))) or bootstraps[-1][1])
    tightness.main(arguments)
    told = capsys.readouterr().out
    for words in (*report.KINDS, "mean |R|/L at p_v", "A.23 says", "tightness.json"):
        assert words in told
    written = json.loads(Path("analyses/tightness.json").read_text())
    assert written["verdict"] in told and written["settings"]["contexts"] == 12
    assert 12 <= len(written["contexts"]) <= 36 and set(written["kinds"]) >= set(report.KINDS)
    for context in written["contexts"]:
        assert 0 < context["p"] < 1 and context["L"] >= 0 and 0 <= context["left_out"] < 1 and context["kinds"]
        assert not data.is_heldout(**context["problem"])
    assert Path("analyses/tightness.png").stat().st_size > 10_000

    config = settings_of(analysis_keys(arguments, tightness.KEYS, {}))
    drawn = draw_step(config, ALONE)  # the same draws once more
    positive = drawn.sampled.mask & (drawn.advantages[:, None] > 0)
    kinds = dict(zip(report.KINDS, (drawn.selected, positive & ~drawn.selected, drawn.forking)))
    for context in written["contexts"]:
        place = context["row"], context["position"]
        assert context["problem"] == drawn.problems[context["row"] // 4]
        assert context["p"] == pytest.approx(drawn.sampled.logprobs[place].exp().item())
        assert all(kinds[kind][place] for kind in context["kinds"] if kind in kinds)
        assert not {"selected", "positive, unselected"} <= set(context["kinds"])
        in_play = "forking" in context["kinds"] and abs(context["R"]) > 1e-9 * context["L"]
        assert in_play == (report.IN_PLAY in context["kinds"])
    ((problems, weights),) = bootstraps
    assert problems == [context["row"] // 4 for context in written["contexts"]]
    bins = [line for line in told.splitlines() if re.match(r" *0[.\d]* - ", line)]
    for kind, estimates in written["kinds"].items():
        own = [context for context in written["contexts"] if kind in context["kinds"]]
        assert len(own) == min(12, int(kinds[kind].sum())) if kind in kinds else 0 < len(own) < 12
        ratios = [abs(context["R"]) / context["L"] for context in own if context["L"] > 0]
        assert estimates["mean"][0] == pytest.approx(np.mean(ratios))
        columns = [i for i, context in enumerate(written["contexts"]) if context in own and context["L"] > 0]
        with np.errstate(invalid="ignore"):
            means = weights[1:, columns] @ ratios / weights[1:, columns].sum(axis=1)
        assert estimates["mean"][1] == pytest.approx(np.nanstd(means))
        assert estimates["rms_corrected"][0] ** 2 == pytest.approx(max(0, np.mean(
            [context["R^2 unbiased"] / context["L"] ** 2 for context in own if context["L"] > 0])))
    for low, high, line in zip(edges[:-1], edges[1:], bins, strict=True):
        inside = [context["kinds"] for context in written["contexts"] if low < context["p"] <= high]
        numbers = [sum(kind in kinds for kinds in inside) for kind in written["kinds"]]
        assert [int(n) for n in re.findall(r"n=(\d+)", line)] == [number for number in numbers if number], line
        assert inside


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
