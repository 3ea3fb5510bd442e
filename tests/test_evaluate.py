"""Tests of evaluate.py: the estimators against slow references, and the command."""

import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import config_of, on_two_ranks, write_jsonl

import evaluate
import toy
from evaluate import Estimate
from support.config import UserError

# ---------------------------------------------------------------- Pass@k and d_collapse


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    "n, c, k", [(10_000, 3, 128), (10_000, 9_990, 9_999), (128, 1, 128), (256, 200, 64)]
)
def test_pass_at_k_for_many_samples(n, c, k):
    missed = 1.0  # by k draws without replacement, one after another
    for i in range(k):
        missed *= max(n - c - i, 0) / (n - i)
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(1 - missed, rel=1e-9)


def test_pass_at_k_of_arrays():
    values = evaluate.pass_at_k(4, np.array([[0, 1], [2, 4]]), 2)
    np.testing.assert_allclose(values, [[0, 0.5], [5 / 6, 1]])
    assert isinstance(evaluate.pass_at_k(4, 1, 2), float)


def test_d_collapse_by_hand():
    base = np.random.default_rng(0).exponential(size=10_007)
    assert evaluate.d_collapse(base, base) == 0
    assert evaluate.d_collapse(base, np.zeros(50)) == 1
    # If every token forks, they are 5 times as many.
    assert evaluate.d_collapse(base, base + 100) == pytest.approx(-4, abs=0.01)
    threshold = np.sort(base)[-math.floor(0.2 * len(base)) - 1]  # a fifth of the tokens is above
    half = np.where(np.arange(len(base)) % 2, base, 0)
    expected = 1 - (half > threshold).mean() / (base > threshold).mean()
    assert evaluate.d_collapse(base, half) == pytest.approx(expected)


@pytest.mark.parametrize("entropy", [[0.0, 1.0], [0.0, 0.0, 1.0, 2.0]])
def test_ties_at_the_threshold_are_no_collapse(entropy):
    """In the first case no token lies above the threshold at all."""
    base = np.array(entropy * 25)
    assert evaluate.d_collapse(base, base) == 0
    yes = np.ones((1, len(base)), dtype=bool)
    result = evaluate.Evaluation(yes, yes.astype(int), yes, base)
    assert result.metrics(result)["d_collapse"].value == 0


# ---------------------------------------------------------------- standard errors and differences


def test_the_error_of_a_ratio_is_that_of_the_jackknife():
    """The tokens of a problem are dependent: the error agrees with leaving out whole problems."""
    rng = np.random.default_rng(0)
    bottom = rng.integers(20, 60, size=200).astype(float)
    top = bottom * rng.normal(0.5, 0.2, size=200)
    left_out = []
    for i in range(200):
        left_out.append(np.delete(top, i).sum() / np.delete(bottom, i).sum())
    jackknife = np.sqrt(199 / 200 * ((left_out - np.mean(left_out)) ** 2).sum())
    estimate = Estimate(top, bottom)
    assert estimate.error == pytest.approx(jackknife, rel=0.02)
    assert Estimate(top[:1], bottom[:1]).error is None


def test_the_bootstrap_against_loops_and_pairing():
    rng = np.random.default_rng(1)
    top = rng.random(40)
    bottom = rng.integers(1, 9, size=40).astype(float)
    first = Estimate(top, bottom)
    second = Estimate(top - 0.01 * rng.random(40), bottom)
    value, low, high = evaluate.difference(first, second)
    gaps = []
    for _ in range(2000):
        draw = rng.integers(40, size=40)
        gaps.append((second.top - first.top)[draw].sum() / bottom[draw].sum())
    assert value == pytest.approx(second.value - first.value)
    assert [low, high] == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=2e-4)
    assert high < 0
    assert high - low < 0.1 * first.error  # what the models share does not widen the interval


# ---------------------------------------------------------------- Evaluation and tables


def made_up(seed=0):
    """Return the result of 3 problems x 20 samples with completions of 1 to 3 tokens."""
    rng = np.random.default_rng(seed)
    correct = np.zeros((3, 20), dtype=bool)
    correct[0, :5] = True
    correct[1, 16:] = True
    lengths = rng.integers(1, 4, size=(3, 20))
    stopped = np.arange(60).reshape(3, 20) < 50
    entropy = rng.random(lengths.sum()).astype(np.float32)
    return evaluate.Evaluation(correct, lengths, stopped, entropy)


def test_metrics_by_hand():
    result = made_up(0)
    base = made_up(1)
    estimates = result.metrics(base)
    values = {name: estimate.value for name, estimate in estimates.items()}
    rates = np.array([5 / 20, 4 / 20, 0])
    assert values["acc@16"] == pytest.approx((5 / 16 + 0 + 0) / 3)
    assert values["pass@1"] == pytest.approx(rates.mean())
    assert estimates["pass@1"].error == pytest.approx(rates.std(ddof=1) / 3**0.5)
    pass_16 = evaluate.pass_at_k(20, np.array([5, 4, 0]), 16)
    assert values["pass@16"] == pytest.approx(pass_16.mean())
    assert values["entropy"] == pytest.approx(result.entropy.mean(), rel=1e-6)
    collapse = evaluate.d_collapse(base.entropy, result.entropy)
    assert values["d_collapse"] == pytest.approx(collapse, abs=1e-9)
    assert values["length"] == pytest.approx(result.lengths.mean())
    assert values["truncated"] == pytest.approx(10 / 60)
    assert result.metrics(result)["d_collapse"].value == pytest.approx(0, abs=1e-12)
    assert "pass@64" not in estimates  # only k <= n
    assert "d_collapse" not in result.summary()


def test_sums_per_problem_against_loops():
    result = made_up()
    start = 0
    for p in range(3):
        total = 0.0
        for length in result.lengths[p]:
            total += float(result.entropy[start : start + length].sum())
            start += length
        assert result.sum_per_problem(result.entropy)[p] == pytest.approx(total, rel=1e-6)


def test_a_stored_result_is_the_same(tmp_path):
    made_up().save(tmp_path / "e.npz")
    loaded = evaluate.Evaluation.load(tmp_path / "e.npz")
    for name, value in vars(made_up()).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


def test_a_table_has_every_value_under_its_model():
    summaries = {"base": made_up().summary(), "trained": made_up().summary(made_up(1))}
    lines = evaluate.metrics_table(summaries).splitlines()
    assert len({len(line) for line in lines}) == 1  # the columns are aligned
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["", "base", "trained"]
    assert evaluate.with_error(-0.0001, None) == "0.000"
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert cells.keys() == summaries["trained"].keys()
    value, error = summaries["trained"]["d_collapse"]
    assert cells["d_collapse"] == ["", f"{value:.3f} ± {error:.3f}"]


def test_a_star_where_the_interval_excludes_0(capsys):
    differences = {"up": (0.2, 0.1, 0.3), "down": (-0.2, -0.3, -0.1), "none": (0.1, -0.1, 0.3)}
    report = {"one": {"up": (0.5, 0.1)}, "two": {"up": (0.7, 0.1), "differences": differences}}
    evaluate.print_comparison("file", report, 3, SimpleNamespace(samples=2, temperature=1.0))
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["up", "+0.200 [+0.100, +0.300] *"],
        ["down", "-0.200 [-0.300, -0.100] *"],
        ["none", "+0.100 [-0.100, +0.300]"],
    ]


def test_examples_are_of_the_easiest_and_the_hardest_problem(monkeypatch, capsys):
    """The first correct and the first wrong completion of each, if there is one."""
    result = made_up()
    result.correct = result.correct[[1, 2, 0]]  # 4, 0 and 5 of 20

    def sample_rows(model, tokenizer, problems, rows, *others, **named):
        correct = torch.tensor(result.correct.ravel()[list(rows)])
        return None, correct, [f"text {row}" for row in rows]

    monkeypatch.setattr(evaluate, "sample_rows", sample_rows)
    config = SimpleNamespace(samples=20, show=1, seed=0)
    evaluate.print_examples("m", None, None, ["A", "B", "C"], result, config, None)
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line] == [
        "m, problem 2: 5 of 20 correct",
        '"C"',
        "correct: text 40",
        "wrong: text 45",
        "m, problem 1: 0 of 20 correct",
        '"B"',
        "wrong: text 20",
    ]


# ---------------------------------------------------------------- the command

TOY = ["toy.layers=1", "toy.hidden=16", "toy.updates=40", "toy.batch=16"]
SMALL = [*TOY, "max_new_tokens=20", "rollout.batch_size=7", "problems=4", "samples=8"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Make two toy models as plain folders."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        toy.save_base_model(folder / name, toy.make_recipe(config_of(*TOY, f"toy.seed={seed}")))
    return folder


@pytest.fixture
def one(toys, tmp_path, monkeypatch):
    """Work in an empty folder; return the argument for the first model."""
    monkeypatch.chdir(tmp_path)
    return f"model={toys / 'one'}"


def stored(folder="."):
    """Read every kept result."""
    return {
        path.name: evaluate.Evaluation.load(path) for path in Path(folder).glob("evaluations/*.npz")
    }


def report():
    """Read the newest report."""
    newest = max(Path("evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_several_models_and_files(toys, one, capsys):
    problems = [{"numbers": [1, 2], "target": 3}, {"numbers": [2, 2], "target": 4}]
    write_jsonl(Path("mine.jsonl"), problems)
    arguments = [
        f"model=[toy,{toys / 'one'},{toys / 'two'}]",
        "data=[auto,mine.jsonl]",
        "show=1",
        *SMALL,
    ]
    evaluate.main(arguments)
    printed = capsys.readouterr().out
    assert "auto:" in printed
    assert "mine.jsonl:" in printed
    assert "paired bootstrap over problems" in printed
    assert len(list(Path("runs").glob("toy-base-*/model.safetensors"))) == 1
    written = report()
    assert written["settings"]["samples"] == 8
    assert written["versions"]["torch"]
    assert written["date"].startswith("20")
    results = written["results"]
    assert results.keys() == {"auto", "mine.jsonl"}
    base, first, _ = results["auto"].values()
    names = "acc@8 pass@1 pass@2 pass@4 pass@8 entropy d_collapse length truncated"
    assert set(names.split()) == base.keys() == first.keys() - {"differences"}
    assert base["d_collapse"][0] == pytest.approx(0, abs=1e-9)  # against itself
    value, low, high = first["differences"]["length"]
    assert value == pytest.approx(first["length"][0] - base["length"][0])
    assert low <= value <= high
    for name, metrics in results["mine.jsonl"].items():
        assert f"{metrics['length'][0]:.3f} ± {metrics['length'][1]:.3f}" in printed
        shown = re.findall(rf"{re.escape(name)}, problem (\d+): (\d+) of 8 correct", printed)
        counts = {int(index): int(count) for index, count in shown[-2:]}  # of the second file
        assert sum(counts.values()) / 16 == pytest.approx(metrics["pass@1"][0])


def test_a_result_is_kept_and_used_again(one, monkeypatch):
    """A killed command loses only the model and file that it was at."""
    Path("mine.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n')
    arguments = [one, "data=[auto,mine.jsonl]", "seed=5", *SMALL]
    calls = []
    sample = evaluate.sample

    def killed_in_the_second(*positional, **named):
        calls.append((named["seed"], named["step"]))
        if len(calls) == 2:
            raise ZeroDivisionError
        return sample(*positional, **named)

    monkeypatch.setattr(evaluate, "sample", killed_in_the_second)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(arguments)
    assert len(stored()) == 1
    evaluate.main(arguments)
    assert calls == [(5, evaluate.EVALUATION_STEP)] * 3
    first = report()["results"]
    for path in Path("evaluations").glob("*.json"):
        path.unlink()
    evaluate.main(arguments)  # nothing is sampled again
    assert len(calls) == 3
    assert report()["results"] == first


def test_other_settings_or_weights_are_another_result(toys, one, monkeypatch):
    shutil.copytree(toys / "one", "model")
    small = ["model=model", *SMALL]
    evaluate.main(small)
    shutil.copy(toys / "two" / "model.safetensors", "model/model.safetensors")
    evaluate.main(small)
    assert len(stored()) == 2
    file = Path("model/config.json")
    shape = json.loads(file.read_text())
    shape["rope_parameters"]["rope_theta"] *= 2
    file.write_text(json.dumps(shape))
    evaluate.main(small)
    assert len(stored()) == 3
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "grader_fingerprint", lambda grader: "another grader")
        evaluate.main(small)
    assert len(stored()) == 4
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.models, "stop_ids", lambda model, words: [words.eos_token_id, 5])
        evaluate.main(small)
    assert len(stored()) == 5
    for count, argument in enumerate(
        [
            "samples=4",
            "seed=1",
            "temperature=0.5",
            "max_new_tokens=5",
            "problems=3",
            "prompt.countdown={target} {numbers} :",
        ],
        start=6,
    ):
        before = stored().keys()
        evaluate.main([*small, argument])
        assert len(stored()) == count, argument
        if argument == "temperature=0.5":
            (new,) = stored().keys() - before
            cold = stored()[new].entropy.mean()
    assert cold < min(result.entropy.mean() for name, result in stored().items() if name != new)


def test_greedy_decoding_is_one_sample(one):
    evaluate.main([one, *SMALL, "temperature=0", "samples=1"])
    metrics = next(iter(report()["results"]["auto"].values()))
    assert "pass@1" in metrics and "d_collapse" not in metrics  # there is no base model
    with pytest.raises(UserError, match="temperature=0"):
        evaluate.main([one, *SMALL, "temperature=0"])


def test_two_ranks_give_the_same_evaluation(toys, one, tmp_path, monkeypatch):
    """Entropies agree to rounding, because each rank computes in other batches."""
    arguments = [f"model=[{toys / 'one'},{toys / 'two'}]", *SMALL]
    evaluate.main(arguments)
    (tmp_path / "ranks").mkdir()
    monkeypatch.chdir("ranks")
    on_two_ranks(lambda: evaluate.main(arguments), tmp_path)
    monkeypatch.chdir(tmp_path)
    alone = stored()
    ranks = stored("ranks")
    assert alone.keys() == ranks.keys()
    assert len(alone) == 2
    for name, result in alone.items():
        np.testing.assert_allclose(result.entropy, ranks[name].entropy, atol=1e-4)
        for field in ("correct", "lengths", "stopped"):
            np.testing.assert_array_equal(getattr(result, field), getattr(ranks[name], field))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["samples=0"], "samples=0"),
        (["steps=3"], "does not use this setting"),
        (["grader=none"], "grader=none: give one of exact, math_verify"),
        (["model=runs/nowhere/model"], "there is no such folder"),
        (["model=[toy,]"], "several as [a,b]"),
        (["data=x.jsonl"], "x.jsonl cannot be read"),
        (["data=owner/name:x"], "owner/name@split"),
        (["data=empty.jsonl"], "empty.jsonl has no problem"),
        (["data=bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["show=-1"], "show=-1"),
        (["max_new_tokens=255"], "does not fit the model's context"),
        (["model=no-tokenizer"], "model=no-tokenizer cannot be loaded"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(toys, one, arguments, words):
    shutil.copytree(toys / "one", "no-tokenizer")
    Path("no-tokenizer/tokenizer.json").unlink()
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"numbers": [1, 2], "target": 3}\nnot json\n')
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        evaluate.main([one, *TOY, "problems=4", *arguments])
    assert "\n" not in str(caught.value)
    assert not Path("evaluations").exists()
