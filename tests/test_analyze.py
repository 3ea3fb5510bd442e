"""The analyses: the law's fit and its intervals, |R|/L where it is known, roles, the page, and every command."""

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import analyze
import config as configs
import data
import rollout
import scope
from analyze import Residual, View
from distributed import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
SMALL = ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=3", "toy.batch=8",
         "prompts_per_step=6", "group_size=4", "max_new_tokens=10", "countdown_problems=50",
         "selection.fraction=0.2"]  # fmt: skip

# ---------------------------------------------------------------- 1 the law


def test_t_quantile_against_tables():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423), (100_000, 1.96)):
        assert analyze.t_quantile(0.975, freedom) == pytest.approx(value, abs=2e-4)
    assert analyze.t_quantile(0.95, 5) == pytest.approx(2.0150, abs=1e-4)


def test_fit_against_lstsq():
    rng = np.random.default_rng(0)
    for n in (3, 5, 40):
        H, R = rng.uniform(0.1, 1.0, n), rng.uniform(0, 1, n)
        design = np.stack([-np.exp(H), np.ones(n)], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, R, rcond=None)
        variance = ((R - design @ [a, b]) ** 2).sum() / (n - 2) * np.linalg.inv(design.T @ design)
        fit = analyze.fit_law(H, R)
        assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-9)
        t = analyze.t_quantile(0.975, n - 2)
        directions = {"a": [1, 0], "b": [0, 1], "b - a": [-1, 1]}
        for name, (value, half) in fit.intervals().items():
            d = np.array(directions[name])
            assert (value, half) == pytest.approx((d @ [a, b], t * math.sqrt(d @ variance @ d)), rel=1e-8)


def test_intervals_cover_what_they_should():
    """300 simulated runs of 6 points: a = 0.6, b = 1.2, and a second run on the same curve has no excess."""
    rng, hits, truth = np.random.default_rng(1), [], {"a": 0.6, "b": 1.2, "b - a": 0.6}

    def run():
        H = np.linspace(0.6, 0.2, 6)
        return H, 1.2 - 0.6 * np.exp(H) + 0.01 * rng.standard_normal(6)

    for _ in range(300):
        fit = analyze.fit_law(*run())
        inside = [abs(value - truth[name]) <= half for name, (value, half) in fit.intervals().items()]
        mean, error, t = analyze.excess(fit, *run())
        hits.append([*inside, abs(mean) <= t * error])
    assert ((0.88 <= np.mean(hits, axis=0)) & (np.mean(hits, axis=0) <= 0.99)).all(), np.mean(hits, axis=0)


def test_excess_finds_a_shift():
    H = np.linspace(0.6, 0.2, 8)
    fit = analyze.fit_law(H, 1.2 - 0.6 * np.exp(H) + 0.001 * (-1) ** np.arange(8))
    mean, error, t = analyze.excess(fit, H, 1.25 - 0.6 * np.exp(H))
    assert mean == pytest.approx(0.05, abs=0.002) and mean > t * error
    scatter = (1.25 - 0.6 * np.exp(H) - (fit.b - fit.a * np.exp(H))).std(ddof=1) / math.sqrt(8)
    assert error == pytest.approx(math.hypot(scatter, fit.at(np.exp(H).mean())[1]))
    assert analyze.excess(fit, H, 1.15 - 0.6 * np.exp(H))[0] == pytest.approx(-0.05, abs=0.002)


def write_run(folder: Path, shift: float = 0.0, points: int = 5):
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval/acc@16": 0.9, "eval/pass@1": 0.2, "eval/entropy": 0.5}]
    for i in range(1, points):
        H = 0.5 - 0.06 * i
        noise = 0.001 * (-1) ** i + shift
        rows += [{"step": 10 * i - 5, "loss": 0.1},
                 {"step": 10 * i, "eval/pass@1": 1.2 - 0.6 * math.exp(H) + noise, "eval/entropy": H}]  # fmt: skip
    rows[0]["eval/pass@1"] = 1.2 - 0.6 * math.exp(0.5)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_law_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/grpo"))
    write_run(Path("runs/up"), shift=0.05)
    write_run(Path("runs/down"), shift=-0.05)
    write_run(Path("runs/same"))
    analyze.main(*analyze.analysis_keys(["law", "runs=runs/grpo,runs/up,runs/down,runs/same", "out=here"]))
    told = capsys.readouterr().out
    assert re.search(r"runs/grpo +5 +0\.500 -> 0\.260 .* \+0\.60\d ±0\.01\d", told.splitlines()[1])
    assert re.search(r"runs/up: its 4 points.* \+0\.0[45]\d+ .*: above it", told)
    assert re.search(r"runs/down: .* -0\.0[45]\d+ .*: below it", told)
    assert re.search(r"runs/same: .*: not beyond noise of it", told)
    assert "5 points are few" in told
    assert Path("here/law.png").stat().st_size > 10_000


def test_runs_that_cannot_be_fitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("two"), points=2)
    with pytest.raises(configs.UserError, match="two: 2 evaluations"):
        analyze.evaluation_points("two")
    Path("two/metrics.jsonl").write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(configs.UserError, match="two/metrics.jsonl, line 2 is not JSON"):
        analyze.evaluation_points("two")
    row = {"step": 0, "eval/acc@16": 0.2, "eval/entropy": 0.5}
    Path("two/metrics.jsonl").write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(configs.UserError, match="entropy never changed"):
        analyze.evaluation_points("two")
    Path("two/metrics.jsonl").write_text("\n".join(json.dumps(row | {"eval/entropy": h}) for h in (0.3, 0.2, 0.1)))
    assert analyze.evaluation_points("two")[1] == (0, 0.2, 0.2)  # Acc@n where there is no Pass@1


# ---------------------------------------------------------------- 2 tightness


def test_advantages_against_every_group_there_is():
    """E|A| over all 2^(G-1) outcomes of the others, each group normalised by hand."""
    for G, rate in ((2, 0.3), (4, 0.0), (5, 0.7), (8, 0.15)):
        table = analyze.advantage_table(G, eps=1e-4)
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
            assert analyze.expected_advantage(rate, table)[r] == pytest.approx(expected, abs=1e-9)


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
        found = analyze.residual(p, v, successes, levels, rng)
        assert abs(found.R) / found.L == pytest.approx(ratios[v].item(), rel=1e-9)
        assert (found.L, found.R) == pytest.approx((exact.L[v].item(), exact.R[v].item()), rel=1e-9)
        assert found.RR == pytest.approx(found.R**2, rel=1e-9)  # both halves are the same here
        assert found.null_L.shape == found.null_R.shape == (100,)


def simulate(rates, *, contexts, M=32):
    """Contexts with these success rates for three tokens, p = 0.7 / 0.2 / 0.1, of the first token."""
    rng, p, levels = np.random.default_rng(5), np.array([0.7, 0.2, 0.1]), np.array([0.3, 1.8])
    return [analyze.residual(p, 0, rng.random((3, M)) < np.array(rates)[:, None], levels, rng) for _ in range(contexts)]


def test_noise_is_told_from_coupling():
    """Where alpha is equal |R| is all noise: the floor says so, and the corrected estimate is about 0."""
    rows = simulate([0.3, 0.3, 0.3], contexts=400)
    figures = analyze.summarise(rows, np.ones((1, 400)))
    assert figures["mean"][0] == pytest.approx(figures["mean_floor"][0], rel=0.1)
    assert figures["sums"][0] == pytest.approx(figures["sums_floor"][0], rel=0.1)
    products = np.array([row.RR for row in rows])
    assert abs(products.mean()) < 4 * products.std() / 20

    rates = torch.tensor([0.5, 0.1, 0.1], dtype=torch.float64)
    exact = scope.residual_ratio(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), 0.3 + 1.5 * rates)[0].item()
    figures = analyze.summarise(simulate(rates.numpy(), contexts=400), np.ones((1, 400)))
    assert figures["rms_corrected"][0] == pytest.approx(exact, rel=0.05)
    assert figures["mean"][0] == pytest.approx(exact, rel=0.1) and figures["mean"][0] > 3 * figures["mean_floor"][0]


def made_up(L, R) -> Residual:
    return Residual(L, R, R * R, np.full(10, L), np.full(10, 0.1 * R))


def test_summary_by_hand():
    """Weights count a context so often; a context without L has no ratio."""
    rows = [made_up(1.0, -0.5), made_up(0.5, 0.1), made_up(0.0, 0.0)]
    figures = analyze.summarise(rows, np.array([[1, 1, 1], [2, 1, 0], [0, 0, 1]]))
    assert figures["mean"][:2] == pytest.approx([(0.5 + 0.2) / 2, (0.5 + 0.5 + 0.2) / 3])
    assert figures["mean_floor"][0] == pytest.approx(0.035)
    assert figures["sums"][:2] == pytest.approx([0.6 / 1.5, 1.1 / 2.5])
    assert figures["rms_corrected"][0] == pytest.approx(math.sqrt((0.25 + 0.04) / 2))
    assert np.isnan(figures["mean"][2])
    assert analyze.with_error(np.array([3.0, 1.0, 2.0, np.nan])) == (3.0, 0.5)


def test_bootstrap_keeps_problems_together():
    weights = analyze.bootstrap_weights([4, 4, 9, 2], np.random.default_rng(0), draws=500)
    assert weights.shape == (501, 4) and (weights[0] == 1).all() and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[1:, 1:].sum(axis=1) == 3).all() and weights[1:].mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("selected, forking, in_play, words", [
    (0.1, 0.3, 0.4, "bears A.23 out"), (0.1, 0.1, 0.3, "does not bear A.23 out"), (0.4, 0.1, 0.3, "contradicts A.23"),
    (0.2, 0.2, 0.2, "does not bear A.23 out"), (0.1, 0.3, None, "bears A.23 out")])  # fmt: skip
def test_verdict_falls_as_the_numbers_do(selected, forking, in_play, words):
    rng, sizes = np.random.default_rng(0), (selected, 0.7, forking, in_play)
    kinds = {}
    for kind, size in zip((*analyze.KINDS, analyze.IN_PLAY), sizes):
        if size is not None:
            rows = [made_up(1.0, size + 0.05 * rng.standard_normal()) for _ in range(30)]
            kinds[kind] = analyze.summarise(rows, analyze.bootstrap_weights(range(30), rng))
    told = analyze.verdict(kinds)
    assert f", which {words}; at unselected" in told
    relation = {-1: "smaller than", 0: "not measurably different from", 1: "larger than"}[np.sign(selected - forking)]
    assert f"{relation} {kinds['forking']['mean'][0]:.3f} (" in told
    assert told.count("[difference") == 2 - (in_play is None)


def test_covered():
    probs = torch.tensor([0.05, 0.6, 0.005, 0.3, 0.045])
    assert analyze.covered(probs, 1, cover=0.9, most=8) == [1, 3]
    assert analyze.covered(probs, 1, cover=0.91, most=8) == [1, 3, 0]
    assert analyze.covered(probs, 1, cover=0.5, most=8) == [1, 3]  # two at least, or there is nothing to compare
    assert analyze.covered(probs, 2, cover=0.999, most=3) == [1, 3, 0, 2]  # and the sampled one
    assert len(analyze.covered(probs, 2, cover=0.9999999, most=8)) == 5


class Letters:
    """A tokenizer for models whose tokens are numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture
def followed(model, prompts, monkeypatch):
    """Rollouts of a tiny model with stop ids 1 and 5, and a grader that likes an even sum."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: sum(map(int, text.split())) % 2 == problem)
    config = SimpleNamespace(max_new_tokens=9, temperature=0.9, seed=3, group_size=2,
                             reward=SimpleNamespace(grader="exact"),
                             rollout=SimpleNamespace(batch_size=50, segment=4))  # fmt: skip
    sampled = rollout.sample(model, prompts, list(range(12)), stop=[1, 5], max_new_tokens=9, temperature=0.9, seed=3,
                             step=0)  # fmt: skip
    drawn = analyze.Step(model, Letters(), [1, 5], [0, 1] * 3, sampled, *[None] * 5)
    return drawn, config


def test_next_token_probs_are_the_sampled_ones(followed):
    drawn, config = followed
    s = drawn.sampled
    places = s.mask.nonzero().tolist()
    sequences = [s.prompts[row] + s.tokens[row, :t].tolist() for row, t in places]
    probs = analyze.next_token_probs(drawn.policy, sequences, temperature=0.9, batch_size=7, world=ALONE)
    own = probs[torch.arange(len(places)), s.tokens[s.mask]]
    assert torch.allclose(probs.sum(dim=1), torch.ones(len(places))) and torch.allclose(own.log(), s.logprobs[s.mask],
                                                                                        atol=1e-4)  # fmt: skip


def test_follow_grades_whole_completions_within_the_limit(followed):
    """Against single rows, sampled one by one with just the room that the limit leaves."""
    drawn, config = followed
    branches = [(0, []), (3, [7, 8]), (4, [9, 5]), (7, [6] * 8), (9, [6] * 9), *((5, [8] * n) for n in range(3, 8))]
    count = 16
    found = analyze.follow(drawn, branches, count, -3, config, ALONE)
    assert found.shape == (10, count) and found.dtype == bool
    for i, (row, begun) in enumerate(branches):
        for j in range(count):
            ids, ended = list(begun), begun[-1:] == [5]
            if not ended and len(begun) < 9:
                one = rollout.sample(drawn.policy, [drawn.sampled.prompts[row] + begun], [i * count + j], stop=[1, 5],
                                     max_new_tokens=9 - len(begun), temperature=0.9, seed=3, step=-3)  # fmt: skip
                ids, ended = ids + one.tokens[0][one.mask[0]].tolist(), one.stopped[0].item()
            assert found[i, j] == (ended and sum(ids) % 2 == row // 2 % 2), (i, j)
    assert found.any() and not found[4].any()  # row 9 filled the limit: truncated
    assert found[2].all() == (14 % 2 == 4 // 2 % 2)


def test_measure_against_a_bandit(followed, monkeypatch):
    """The forced token alone decides: even ones win. alpha is then known, and |R|/L is the identity's."""
    drawn, config = followed
    config.cover, config.most, config.continuations, config.others = 0.95, 5, 4, 8
    config.grpo = SimpleNamespace(advantage_eps=1e-4)
    asked = []

    def bandit(drawn, branches, count, step, config, world):
        asked.append((step, count, branches))
        if step == analyze.OTHERS:  # the success rate of problem g is g / 8
            return np.array([[j < row // 2 for j in range(count)] for row, _ in branches])
        return np.array([[ids[-1] % 2 == 0] * count for _, ids in branches])

    monkeypatch.setattr(analyze, "follow", bandit)
    places = [(2, 0), (11, 1), (3, 2), (8, 0), (9, 1)]
    places = [place for place in places if drawn.sampled.mask[place]]
    found = analyze.measure(drawn, places, config, np.random.default_rng(0), ALONE)
    assert [step for step, *_ in asked] == [analyze.OTHERS, analyze.FORCED] and len(places) >= 3
    table = analyze.advantage_table(2, eps=1e-4)
    for (row, t), (residual, left_out) in zip(places, found):
        sequence = drawn.sampled.prompts[row] + drawn.sampled.tokens[row, :t].tolist()
        probs = analyze.next_token_probs(drawn.policy, [sequence], temperature=0.9, batch_size=1, world=ALONE)[0]
        token = int(drawn.sampled.tokens[row, t])
        ids = analyze.covered(probs, token, cover=0.95, most=5)
        low, high = analyze.expected_advantage((row // 2) / 8, table)
        alpha = torch.tensor([high if v % 2 == 0 else low for v in ids], dtype=torch.float64)
        p = probs[ids].double()
        assert left_out == pytest.approx(1 - p.sum().item(), abs=1e-6)
        exact = scope.residual_ratio(p / p.sum(), alpha)[ids.index(token)].item()
        assert abs(residual.R) / residual.L == pytest.approx(exact, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- 3 tokens


@pytest.mark.parametrize("chain, roles", [
    ("3 * 5 = 15 , 15 + 7 = 22 <eos>", "d o d s r s d o d s r x"),
    ("3 * 5 = 1 5 , 2 - 2 = 0", "d o d s r r s d o d s r"),  # a number in pieces
    ("= 3 4 + 5", "s r r o d"),  # malformed from here on
    ("3 + = = 7 , , -> 8", "d o s s r s s ? d"),
    ("<pad> 3 : x15 1.5", "? d ? ? ?"),
    (", 3 <eos> <eos> 4", "s d x x d"),
    ("", ""),
])  # fmt: skip
def test_roles(chain, roles):
    names = {"d": "operand", "o": "operator", "s": "separator", "r": "result", "x": "stop", "?": "other"}
    assert analyze.role_of_tokens(chain.split()) == [names[role] for role in roles.split()]


def test_roles_of_other_tokenizers():
    assert analyze.role_of_tokens([" 3", "+", " 4", " =", "7", "</s>"], stop=("</s>",))[-2:] == ["result", "stop"]


def test_role_table_by_hand():
    roles = ["operand"] * 6 + ["operator"] * 3 + ["stop"]
    table = analyze.role_table(roles, [True] * 3 + [False] * 3 + [True] + [False] * 3, [0.5] * 10, [0.1] * 10)
    operator, operand, stop = (line.split() for line in table.splitlines()[1:])
    assert operand == ["operand", "6", "60.0%", "3", "75.0%", "1.25", "0.500", "0.100"]
    assert operator[4:6] == ["25.0%", "0.83"] and stop[3:6] == ["0", "0.0%", "0.00"]
    assert "0.00" in analyze.role_table(roles, [False] * 10, [0.5] * 10, [0.0] * 10)  # nothing selected


def view(text, score=0.0, selected=False):
    return View(text, "operand", 0.5, 0.7, 2.0, score, selected)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words, self.titles, self.open = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open = tag
        if tag == "span":
            self.titles.append(dict(attrs))

    def handle_data(self, text):
        if self.open == "span" and text.strip():
            self.words.append(text)


def test_html_is_escaped_and_alone():
    nasty = ['<script>alert("1")</script>', "&amp;", "'\" onmouseover=x", "a\nb"]
    groups = [("<b>prompt", [("right", [view(text, 0.4, text == "&amp;") for text in nasty])])]
    text = analyze.html_page("<i>title", "a < b", groups, largest=0.5)
    page = Page()
    page.feed(text)
    assert set(page.tags) == {"html", "meta", "title", "style", "h1", "pre", "p", "h2", "div", "i", "span"}
    assert page.words == [*nasty[:3], "a⏎b"]
    assert page.titles[0].keys() == {"style", "title"} and "0.80" in page.titles[0]["style"]
    assert [t.get("class") for t in page.titles] == [None, "selected", None, None]
    assert page.titles[1]["title"] == "operand: p 0.500, entropy 0.700, advantage +2.000, score 0.400, selected"
    assert "http" not in text and "<script" not in text


def test_ansi():
    line = analyze.ansi([view("3"), view("+", 0.1), view("4", 0.5, True), view("\x1b[2J\n")], largest=0.5)
    assert line == "3 \x1b[48;5;224;30m+\x1b[0m \x1b[48;5;196;30;1;4m4\x1b[0m [2J⏎"
    assert analyze.ansi([view("3")], largest=0.0) == "3"


# ---------------------------------------------------------------- the commands


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A working folder of its own, and a reward that a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: text[-1:] in tuple("13579"))
    monkeypatch.setattr(rollout, "stop_ids", lambda model, tokenizer: list(range(40)))


def test_tightness_command(in_tmp, capsys):
    arguments = [*SMALL, "contexts=5", "continuations=6", "others=6", "cover=0.2", "most=3"]
    analyze.main(*analyze.analysis_keys(["tightness", *arguments]))
    told = capsys.readouterr().out
    for words in (*analyze.KINDS, "mean |R|/L at p_v", "A.23 says", "tightness.json"):
        assert words in told
    report = json.loads(Path("analysis/tightness.json").read_text())
    assert report["verdict"] in told and report["settings"]["contexts"] == 5
    assert 5 <= len(report["contexts"]) <= 15 and set(report["kinds"]) >= set(analyze.KINDS)
    for context in report["contexts"]:
        assert 0 < context["p"] < 1 and context["L"] >= 0 and 0 <= context["left_out"] < 1 and context["kinds"]
        assert not data.is_heldout(**context["problem"])
    assert Path("analysis/tightness.png").stat().st_size > 10_000


def test_tightness_needs_successes(in_tmp, monkeypatch):
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: False)
    with pytest.raises(configs.UserError, match="selected, positive, unselected: raise group_size"):
        analyze.main(*analyze.analysis_keys(["tightness", *SMALL]))


def test_tokens_command_of_a_run(in_tmp, capsys):
    """run= gives the settings and the model; further keys on the command line win."""
    from toy import model_folder

    keys = configs.override(configs.read_defaults(), [*SMALL, "seed=4", "steps=2"])
    made = Path(model_folder("toy", configs.namespace(configs.nest(keys))))
    Path("runs/a").mkdir(parents=True)
    made.rename("runs/a/model")
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(configs.nest(keys)))
    what, found = analyze.analysis_keys(["tokens", "run=runs/a", "group_size=5", "shown=2"])
    assert what == "tokens" and (found["seed"], found["group_size"], found["max_new_tokens"]) == (4, 5, 10)
    assert found["model"] == "runs/a/model" and "steps" not in found
    analyze.main(what, found)
    told = capsys.readouterr().out
    total = int(re.search(r"selects (\d+) of (\d+) tokens", told)[1])
    assert total > 0 and "operand" in told and "share of selected" in told and "[selected]" in told
    page = Page()
    page.feed(Path("analysis/tokens.html").read_text())
    assert page.tags.count("h2") == 2 and page.tags.count("div") == 10 and len(page.titles) > 10


@pytest.mark.parametrize("arguments, words", [
    ([], "say what to analyse"), (["laws"], "laws: say what"), (["law"], "give a word"),
    (["law", "runs=nowhere"], "runs=nowhere: no metrics.jsonl"), (["tokens", "contexts=3"], "unknown config key"),
    (["tokens", "run=nowhere"], "run=nowhere: no config.yaml"), (["tokens", "model=./nowhere"], "no such folder"),
    (["tightness", "continuations=1"], "continuations=1"), (["tightness", "group_size=1"], "group_size=1"),
    (["tightness", "cover=1.0"], "cover=1.0"), (["tightness", "reward=token_entropy"], "reward"),
    (["tokens", "forking_fraction=0.0"], "forking_fraction=0.0"), (["tokens", "step=-1"], "step=-1"),
])  # fmt: skip
def test_bad_input(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(configs.UserError) as error:
        analyze.analysis_keys(arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_words_that_other_files_know(in_tmp):
    for argument, words in (("reward=praise", "self_certainty"), ("selection.strategy=best", "scope")):
        with pytest.raises(configs.UserError, match=words):
            analyze.main(*analyze.analysis_keys(["tokens", argument]))


@pytest.mark.parametrize("arguments, words", [(["tokens", "model=nowhere"], "no such folder"), (["lore"], "lore")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run([sys.executable, ROOT / "analyze.py", *arguments], cwd=tmp_path, capture_output=True,
                            text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ") and words in result.stderr
