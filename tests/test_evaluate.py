"""Pass@k against enumeration of subsets, d_collapse at its fixed points, and the table."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

import completions as kept
import evaluate
import toy
from support import config as configs
from support import plots
from support.statistics import Estimate, average, difference


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(10_000, 3, 128), (10_000, 9_990, 9_999), (128, 1, 128), (256, 200, 64)])
def test_pass_at_k_for_many_samples(n, c, k):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # whole numbers of any length
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)


def test_pass_at_k_of_arrays():
    values = evaluate.pass_at_k(4, np.array([[0, 1], [2, 4]]), 2)
    np.testing.assert_allclose(values, [[0, 0.5], [5 / 6, 1]])
    assert isinstance(evaluate.pass_at_k(4, 1, 2), float)


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 5, 2), (4, -1, 2), (4, 1, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        evaluate.pass_at_k(n, c, k)


def test_d_collapse():
    base = np.random.default_rng(0).exponential(size=10_007)
    assert evaluate.d_collapse(base, base) == 0
    assert evaluate.d_collapse(base, np.zeros(50)) == 1
    assert evaluate.d_collapse(base, base + 100) == pytest.approx(-4, abs=0.01)  # every token forks: 5 times as many
    threshold = np.sort(base)[-math.floor(0.2 * len(base)) - 1]  # by hand: a fifth of the tokens lies above
    half = np.where(np.arange(len(base)) % 2, base, 0)
    by_hand = 1 - (half > threshold).mean() / (base > threshold).mean()
    assert evaluate.d_collapse(base, half) == pytest.approx(by_hand)


def test_d_collapse_with_ties():
    """Half of the base's tokens share the largest entropy: they are the threshold, none lies above."""
    base = np.array([0.0, 1.0] * 50)
    assert evaluate.d_collapse(base, base) == 0
    quarter = np.array([0.0, 0.0, 1.0, 2.0] * 25)
    assert evaluate.d_collapse(quarter, quarter) == 0


def made_up(seed=0):
    """3 problems x 20 samples; completions of 1 to 3 tokens."""
    rng = np.random.default_rng(seed)
    correct = np.zeros((3, 20), dtype=bool)
    correct[0, :5] = True
    correct[1, 16:] = True
    answers = rng.integers(4, size=(3, 20))
    lengths = rng.integers(1, 4, size=(3, 20))
    stopped = np.arange(60).reshape(3, 20) < 50
    return evaluate.Evaluation(correct, answers, lengths, stopped, rng.random(lengths.sum()).astype(np.float32))


def test_figures_by_hand():
    e, other = made_up(0), made_up(1)
    figures = {name: (f.value, f.error) for name, f in e.metrics([1, 16], other).items()}
    assert figures["acc@16"][0] == pytest.approx((5 / 16 + 0 + 0) / 3)
    rates = np.array([5 / 20, 4 / 20, 0])
    assert figures["pass@1"] == (pytest.approx(rates.mean()), pytest.approx(rates.std(ddof=1) / 3**0.5))
    assert figures["pass@16"][0] == pytest.approx(evaluate.pass_at_k(20, np.array([5, 4, 0]), 16).mean())
    assert figures["distinct"][0] == np.mean([len(set(row)) for row in e.answers.tolist()])
    assert figures["entropy"][0] == pytest.approx(e.entropy.mean(), rel=1e-6)
    assert figures["d_collapse"][0] == pytest.approx(evaluate.d_collapse(other.entropy, e.entropy), abs=1e-9)
    assert figures["length"][0] == pytest.approx(e.lengths.mean())
    assert figures["truncated"][0] == pytest.approx(10 / 60)
    assert e.metrics([1], e)["d_collapse"].value == pytest.approx(0, abs=1e-12)
    json.dumps(e.summary(other))
    assert "pass@64" not in e.summary()  # k <= n only


def test_d_collapse_on_fixed_text():
    """On the base's own text: 0 for the base itself, 1 for a deterministic model."""
    e = made_up()
    zero = np.zeros_like(e.entropy)
    assert e.metrics([1], e, e.entropy)["d_collapse fixed"].value == pytest.approx(0, abs=1e-12)
    assert e.metrics([1], e, zero)["d_collapse fixed"].value == 1


def test_per_problem_sums_by_loops():
    e, at = made_up(), 0
    for p in range(3):
        total = 0.0
        for length in e.lengths[p]:
            total += float(e.entropy[at : at + length].sum())
            at += length
        assert e.per_problem(e.entropy)[p] == pytest.approx(total, rel=1e-6)


def test_error_of_a_ratio_is_that_of_the_jackknife():
    """Tokens of a problem stand together: the clustered error agrees with leaving one problem out at a time."""
    rng = np.random.default_rng(0)
    bottom = rng.integers(20, 60, size=200).astype(float)
    figure = Estimate(bottom * rng.normal(0.5, 0.2, size=200), bottom, offset=1.0, scale=-5.0)
    left_out = [1 - 5 * np.delete(figure.top, i).sum() / np.delete(bottom, i).sum() for i in range(200)]
    jackknife = np.sqrt(199 / 200 * ((left_out - np.mean(left_out)) ** 2).sum())
    assert figure.error == pytest.approx(jackknife, rel=0.02)


def slow_majority(answers, correct, k):
    values = []
    for first in range(0, len(answers) - k + 1, k):
        part, right = answers[first : first + k], correct[first : first + k]
        votes = {a: part.count(a) for a in part}
        tied = [a for a in votes if votes[a] == max(votes.values())]
        values.append(sum(right[part.index(a)] for a in tied) / len(tied))
    return sum(values) / len(values)


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_majority_at_k_against_loops(k):
    rng = np.random.default_rng(k)
    answers = rng.integers(5, size=(6, 20))
    correct = answers == rng.integers(5, size=(6, 1))  # an answer is right or wrong, not a sample
    expected = [slow_majority(a, c, k) for a, c in zip(answers.tolist(), correct.tolist())]
    np.testing.assert_allclose(evaluate.majority_at_k(answers, correct, k), expected)


def test_bootstrap_covers():
    """Paired differences of known mean: the 95 % interval holds it in about 95 % of simulated evaluations."""
    rng, held = np.random.default_rng(0), 0
    for trial in range(300):
        skill = rng.beta(0.5, 1.5, size=80)  # problems differ; both models share that
        one, two = (rng.binomial(16, np.clip(skill + gain, 0, 1)) / 16 for gain in (0.0, 0.1))
        truth = np.clip(np.array(skill) + 0.1, 0, 1).mean() - skill.mean()
        ones = np.ones(80)
        figures = Estimate(one, ones), Estimate(two, ones)
        d, low, high = difference(*([figure] for figure in figures), resamples=400, seed=trial)
        held += low <= truth <= high
        assert low <= d <= high
    assert 0.9 <= held / 300 <= 0.99


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    skill, ones = rng.random(200), np.ones(200)
    one, two = Estimate(skill, ones), Estimate(skill + 0.01 * rng.random(200), ones)
    _, low, high = difference([one], [two])
    assert 0 < low < high < 0.01 and high - low < 0.1 * one.error


def test_average_over_problem_sets():
    """Each set counts the same, whatever its size; differences against a bootstrap written out in loops."""
    rng = np.random.default_rng(2)
    sets = [[Estimate(rng.random(size), np.ones(size)) for size in (40, 10)] for _ in range(2)]
    value, error = average(sets[0])
    assert value == pytest.approx((sets[0][0].top.mean() + sets[0][1].top.mean()) / 2)
    assert error == pytest.approx(math.hypot(sets[0][0].error, sets[0][1].error) / 2)
    assert average([sets[0][0], Estimate(np.ones(1), np.ones(1))])[1] is None
    gap, low, high = difference(*sets)
    means = []
    for _ in range(2000):
        draws = [rng.integers(size, size=size) for size in (40, 10)]
        means.append(sum((other.top - one.top)[draw].mean() for one, other, draw in zip(*sets, draws)) / 2)
    assert gap == pytest.approx(sum(other.value - one.value for one, other in zip(*sets)) / 2)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_table_and_file_round_trip(tmp_path):
    table = evaluate.format_table({"base": made_up().summary(), "trained": made_up().summary(made_up())})
    lines = table.splitlines()
    assert lines[:2] == ["|  | base | trained |", "| --- | --- | --- |"]
    (collapse,) = [line.split(" | ") for line in lines if "d_collapse" in line]
    value = made_up().summary(made_up())["d_collapse"][0]
    assert collapse[1] == "-" and float(collapse[2].split()[0]) == round(value, 3)
    made_up().save(tmp_path / "e.npz")
    loaded = evaluate.Evaluation.load(tmp_path / "e.npz")
    for name, value in vars(made_up()).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


# ---------------------------------------------------------------- the command


SMALL = ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=40", "toy.batch=16",
         "max_new_tokens=20", "rollout.batch_size=7", "problems=4", "samples=8"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Two toy models of one vocabulary, as plain folders."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "updates": 40, "batch": 16, "lr": 3e-3,
                "also": ""}
    words = {"prompt": "{numbers} -> {target} :", "countdown": {"numbers": 4, "largest": 20, "limit": 99}}
    for seed, name in enumerate(("one", "two")):
        toy.base_model(folder / name, **words, toy=settings | {"seed": seed})
    return folder


def run(arguments):
    evaluate.main(configs.evaluation_keys(arguments))


def completions(folder):
    return {path.parent.name: path.read_bytes() for path in Path(folder).glob("evaluations/*/completions.jsonl")}


def test_several_models_and_files(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n{"numbers": [2, 2], "target": 4}\n')
    words = [f"models=[{toys / 'one'},{toys / 'two'}]", "data=[auto,mine.jsonl]", "k=[1,8]", "out=first.try", *SMALL]
    run([*words, "show=1"])
    printed = capsys.readouterr().out
    assert "auto:" in printed and "mine.jsonl:" in printed and "average of 2 problem sets:" in printed
    assert "Pass@8 (k = n)" in printed and printed.count("d_collapse fixed") >= 6 and "paired bootstrap" in printed
    stored = json.loads(Path("evaluations/first.try.json").read_text())
    assert stored["settings"]["samples"] == 8 and stored["versions"]["torch"] and stored["date"].startswith("20")
    report = stored["results"]
    assert report.keys() == {"auto", "mine.jsonl", "average"}
    for name, own in report["average"].items():
        assert own["pass@1"][0] == pytest.approx((report["auto"][name]["pass@1"][0]
                                                  + report["mine.jsonl"][name]["pass@1"][0]) / 2)
    one, two = report["auto"].values()
    assert one["d_collapse"][0] == pytest.approx(0, abs=1e-9)  # against itself ...
    assert one["d_collapse fixed"][0] == pytest.approx(0, abs=0.02)  # ... scored anew: tokens at the threshold may tip
    assert {"acc@8", "pass@1", "pass@8", "majority@8", "distinct", "length", "truncated", "differences"} <= two.keys()
    assert len(completions(tmp_path)) == 4
    assert Path("evaluations/first.try.png").stat().st_size > 5000
    counts = [json.loads(line) for line in Path("evaluations/first.try.problems.jsonl").read_text().splitlines()]
    assert [row["data"] for row in counts] == ["auto"] * 4 + ["mine.jsonl"] * 2
    assert counts[-1]["problem"] == {"numbers": [2, 2], "target": 4} and counts[-1]["samples"] == 8
    for name, own in report["mine.jsonl"].items():
        assert sum(row["correct"][name] for row in counts[4:]) / 16 == pytest.approx(own["pass@1"][0])
        best = max(counts[4:], key=lambda row: row["correct"][name])  # the first of equal ones
        assert f"{name}, problem {counts[4:].index(best)}: {best['correct'][name]} of 8 right" in printed
    run(words)  # the same once more
    with pytest.raises(configs.UserError, match="out=first.try: .* holds something else"):
        run([*words, "seed=1"])
    for text in ("{", "[]", "{}"):
        Path("evaluations/mine.json").write_text(text)
        with pytest.raises(configs.UserError, match="out=mine: .* holds something else"):
            run([*words, "out=mine"])
        assert Path("evaluations/mine.json").read_text() == text
    rows = [json.loads(line) for line in next(iter(completions(tmp_path).values())).decode().splitlines()[1:]]
    assert [(row["problem"], row["sample"]) for row in rows] == sorted((row["problem"], row["sample"]) for row in rows)
    names = {"problem", "sample", "text", "correct", "length", "stopped", "entropy", "tokens", "entropies"}
    assert rows[0].keys() == names


def test_the_toy_among_other_models(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run([f"model=[toy,{toys / 'one'}]", "samples=2", *SMALL[:-1]])
    table = capsys.readouterr().out
    assert re.search(r"^ *toy ", table, re.MULTILINE) and str(toys / "one") in table
    assert len(list(Path("runs").glob("toy-base-*"))) == 1


def test_killed_and_resumed_is_byte_identical(toys, tmp_path, monkeypatch):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    run([f"model={toys / 'one'}", *SMALL])
    monkeypatch.chdir(tmp_path / "broken")
    sample, calls = kept.sample_and_grade, []

    def stumble(*arguments, **named):
        calls.append(1)
        return sample(*arguments, **named) if len(calls) < 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(kept, "sample_and_grade", stumble)
        with pytest.raises(ZeroDivisionError):
            run([f"model={toys / 'one'}", *SMALL])
    assert not completions(".")
    run([f"model={toys / 'one'}", *SMALL])
    assert completions(".") == completions(tmp_path / "whole")
    before = len(calls)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "sample_and_grade", stumble)
        run([f"model={toys / 'one'}", *SMALL])  # all there: nothing is drawn again
    assert len(calls) == before


def test_damaged_parts_are_drawn_anew_and_damaged_completions_refused(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, write, parts = [f"model={toys / 'one'}", *SMALL], kept.write, []

    def stop(file, header, text):
        if file.name == "completions.jsonl":
            raise ZeroDivisionError
        parts.append(file)
        write(file, header, text)

    with monkeypatch.context() as patch:
        patch.setattr(kept, "write", stop)
        with pytest.raises(ZeroDivisionError):
            run(words)
    whole = [part.read_bytes() for part in parts]
    assert len(parts) >= 4
    for part, damaged in zip(parts, (b"", whole[0], whole[2].replace(b'"correct": false', b'"correct": true', 1))):
        part.write_bytes(damaged)  # cut; of another chunk; edited
    parts[3].write_bytes(whole[3][:-9])
    capsys.readouterr()
    run(words)
    notes = [line for line in capsys.readouterr().err.splitlines() if "drawn anew" in line]
    assert notes == [f"note: {part} is damaged: drawn anew" for part in parts[:4]]
    (done,) = Path("evaluations").glob("*/completions.jsonl")
    assert done.read_bytes().partition(b"\n")[2] == b"".join(part.partition(b"\n")[2] for part in whole)
    done.write_text(done.read_text().replace('"correct": false', '"correct": true', 1))
    with pytest.raises(configs.UserError, match="completions.jsonl is damaged: delete"):
        run(words)


def test_one_process_at_a_time(toys, tmp_path, monkeypatch):
    """While a first one draws, the second is refused; what it leaves of itself locks nobody out."""
    monkeypatch.chdir(tmp_path)
    sample, words = kept.sample_and_grade, [f"model={toys / 'one'}", *SMALL]

    def meanwhile(*arguments, **named):
        monkeypatch.setattr(kept, "sample_and_grade", sample)
        with pytest.raises(configs.UserError, match=f"in use by process {os.getpid()}"):
            run(words)
        return sample(*arguments, **named)

    monkeypatch.setattr(kept, "sample_and_grade", meanwhile)
    run(words)
    assert len(completions(".")) == 1 and not list(Path("evaluations").glob("*/lock"))


def test_two_ranks_give_the_same_evaluation(toys, tmp_path, monkeypatch, capsys):
    """The same draws, verdicts and table; entropies to rounding, for each rank computes with fewer threads."""
    arguments = [f"models=[{toys / 'one'},{toys / 'two'}]", *SMALL]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    run(arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run([*command, ROOT / "evaluate.py", *arguments], cwd=tmp_path / "two", capture_output=True,
                            text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    assert capsys.readouterr().out == result.stdout
    one, other = completions(tmp_path / "one"), completions(tmp_path / "two")
    assert one.keys() == other.keys() and len(one) == 2
    for name in one:
        for line, other_line in zip(one[name].splitlines()[1:], other[name].splitlines()[1:], strict=True):
            row, other_row = json.loads(line), json.loads(other_line)
            assert row.pop("entropies") == pytest.approx(other_row.pop("entropies"), abs=1e-4)
            assert row.pop("entropy") == pytest.approx(other_row.pop("entropy"), abs=1e-4)
            assert row == other_row


def test_other_settings_or_weights_are_another_evaluation(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toys / "one", "model")
    run(["model=model", *SMALL])
    run(["model=model", *SMALL, "seed=1"])
    shutil.copy(toys / "two" / "model.safetensors", "model/model.safetensors")
    run(["model=model", *SMALL])
    assert len(completions(".")) == 3 and len(set(completions(".").values())) == 3
    others = ["temperature=0.5", "max_new_tokens=5", "problems=3", "samples=4", "prompt.countdown={target} {numbers} :",
              "reward.grader=math_verify", "rollout.batch_size=9", "countdown.largest=9"]
    for count, word in enumerate(others, start=4):
        run(["model=model", *SMALL, word])
        assert len(completions(".")) == count, word
    entropies = {}  # of the colder evaluation, and of the one that differs in nothing else
    for lines in map(bytes.splitlines, completions(".").values()):
        settings = json.loads(lines[0])
        temperature, _ = settings.pop("temperature"), settings.pop("crc")
        mean = np.mean([json.loads(line)["entropy"] for line in lines[1:]])
        entropies.setdefault(json.dumps(settings), {})[temperature] = mean
    (pair,) = [found for found in entropies.values() if len(found) == 2]
    assert pair[0.5] < pair[1.0] - 1e-3, pair


def test_without_matplotlib_one_line_says_how(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.picture(tmp_path / "x.png", None) == "no x.png: pip install matplotlib"


@pytest.mark.parametrize(
    "arguments, words",
    [(["k=[1,32]"], "k=32 with samples=16"), (["k=[0]"], "k=[0]"), (["samples=0"], "samples=0"),
     (["steps=3"], "steps"), (["model=[toy,nowhere]"], "nowhere: no such folder"), (["data=[auto,x.jsonl]"], "x.jsonl"),
     (["model=[toy,]"], "several as [a,b]"), (["out=a/b"], "out=a/b"), (["show=-1"], "show=-1"),
     (["data=[auto,owner/name:x]"], "owner/name@split")],
)
def test_bad_input(arguments, words):
    with pytest.raises(configs.UserError, match=re.escape(words)):
        configs.evaluation_keys(arguments)


def test_bad_files(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toys / "one", "no-tokenizer")
    Path("no-tokenizer/tokenizer.json").unlink()
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"numbers": [1, 2], "target": 3}\nnot json\n')
    for arguments, words in [
        (["model=no-tokenizer"], "holds no tokenizer.json"),
        ([f"model={toys / 'one'}", "data=empty.jsonl"], "holds no problem"),
        ([f"model={toys / 'one'}", "data=bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        ([f"model={toys / 'one'}", "max_new_tokens=255"], "does not fit the model's context"),
    ]:
        with pytest.raises(configs.UserError, match=re.escape(words)):
            run([*SMALL, *arguments])
    assert not completions(".")
