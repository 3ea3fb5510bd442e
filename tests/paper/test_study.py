"""paper.study: a study in miniature, the choice of settings, the bootstrap, the table."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from helpers import run_copy

from data import is_heldout, problem_key
from evaluate import pass_at_k
from paper import figures, reproduce, study
from support.config import UserError, load_config
from support.files import read_jsonl
from train import check_methods

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SMALL = (
    "toy.layers=1 toy.hidden=16 toy.updates=3 toy.batch=8 prompts_per_step=4 group_size=4 "
    "max_new_tokens=12 evaluation.problems=3 evaluation.samples=4 countdown_problems=50 "
    "save_every=1 selection.fraction=0.3"
)
MINIATURE = study.Study(
    overrides=f"{SMALL} seed={{seed}}",
    tuning="evaluation.every=2 evaluation.samples_between=4",
    test="evaluation.data=[auto,other.jsonl] evaluation.every=0",
    methods={name: study.METHODS[name] for name in ("GRPO", "SCOPE")},
    rates=(0.01,),
    penalised_rates=(0.02,),
    coefs=(0.1, 0.3),
    stops=(2, 3),
    tuning_seeds=(1000,),
    seeds=(0, 1),
)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rewards.is_correct", lambda problem, text, grader: text.count("1") > 1)
    copies = SimpleNamespace(run=run_copy, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(reproduce, "subprocess", copies)
    monkeypatch.setattr(study, "tqdm", lambda lines, **settings: lines)
    monkeypatch.setattr(study, "STUDIES", {"miniature": MINIATURE})
    monkeypatch.setattr(figures, "picture", lambda path, *others: f"no {path}")
    rows = [{"numbers": [i, 2], "target": i + 2} for i in range(3, 6)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_study_in_miniature(in_tmp):
    study.main(["miniature"])
    runs = read_jsonl(Path("results/miniature/runs.jsonl"))
    tuning = [run for run in runs if run["stage"] == "tuning"]
    assert sorted((run["method"], run["coef"]) for run in tuning) == [
        ("GRPO", 0.0),
        ("SCOPE", 0.1),
        ("SCOPE", 0.3),
    ]
    for run in tuning:
        rows = read_jsonl(Path("runs") / run["run"] / "metrics.jsonl")
        assert run["validation"].keys() == {"2", "3"}
        for step, metrics in run["validation"].items():
            logged = [row for row in rows if row["step"] == int(step) and "eval/pass@1" in row]
            assert metrics["d_collapse"] == logged[0]["eval/d_collapse"]
        assert run["config"]["optimizer.lr"] == (0.02 if run["coef"] else 0.01)
        assert run["config"]["optimizer.warmup"] == 0.1
        assert run["config"]["selection.kl_coef"] == (run["coef"] or 0.03)
    choices = study.choose(runs)
    test = [run for run in runs if run["stage"] == "test"]
    assert [(run["method"], run["seed"]) for run in test] == [
        ("GRPO", 0),
        ("GRPO", 1),
        ("SCOPE", 0),
        ("SCOPE", 1),
    ]
    for run in test:
        assert (run["method"], run["rate"], run["coef"], run["steps"]) == choices[run["method"]]
        assert run["config"]["steps"] == run["steps"]
        assert run["config"]["seed"] == run["seed"]
        # the warm-up of the longest run
        assert run["config"]["optimizer.warmup"] * run["steps"] == pytest.approx(0.3)
        assert [len(curve) for curve in run["curves"].values()] == [run["steps"]] * 2
        for result in run["test"].values():
            assert result["samples"] == 4
            for model in ("base", "trained"):
                counts = np.array(result["correct"][model])
                assert len(counts) == 3
                assert pass_at_k(4, counts, 1).mean() == pytest.approx(result[model]["pass@1"][0])
    assert not list(Path("runs").glob("miniature-*/checkpoints"))
    text = Path("results/miniature/table.md").read_text()
    for words in ("## auto", "## other", "SCOPE − GRPO", "base model"):
        assert words in text
    times = [path.stat().st_mtime_ns for path in sorted(Path("runs").glob("*.log"))]
    study.main(["miniature"])  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in sorted(Path("runs").glob("*.log"))] == times
    assert read_jsonl(Path("results/miniature/runs.jsonl")) == runs


def tuned(method, rate, coef, seed, **steps):
    validation = {step[4:]: {"pass@1": value} for step, value in steps.items()}
    return dict(
        stage="tuning", method=method, rate=rate, coef=coef, seed=seed, validation=validation
    )


def test_the_choice_is_the_highest_mean_over_tuning_seeds():
    runs = [
        tuned("GRPO", 1, 0, 5, step20=0.5, step40=0.1),
        tuned("GRPO", 1, 0, 6, step20=0.1, step40=0.4),
        tuned("GRPO", 2, 0, 5, step20=0.2, step40=0.2),
        tuned("GRPO", 2, 0, 6, step20=0.2, step40=0.2),
        tuned("SCOPE", 1, 0.3, 5, step20=0.2, step40=0.3),
        tuned("SCOPE", 1, 0.1, 5, step20=0.2, step40=0.4),
        {"stage": "test", "method": "SCOPE"},
    ]
    assert study.choose(runs) == {"GRPO": ("GRPO", 1, 0, 20), "SCOPE": ("SCOPE", 1, 0.1, 40)}


def test_the_bootstrap_knows_both_sources():
    """Seeds and problems that differ each widen the interval, as the variances say."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(size=(30, 1))
    problems = rng.normal(size=(1, 40))
    for values, error in (
        (seeds + 0 * problems, seeds.std() / 30**0.5),
        (problems + 0 * seeds, problems.std() / 40**0.5),
        (seeds + problems, (seeds.var() / 30 + problems.var() / 40) ** 0.5),
    ):
        mean, low, high = study.bootstrap(values)
        assert mean == pytest.approx(values.mean())
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def reported(method, seed, counts):
    metrics = {"entropy": [0.1 * (seed + 1), None], "d_collapse": [0.5, None]}
    result = {"base": metrics, "trained": metrics, "samples": 4}
    result["correct"] = {"base": [0, 0], "trained": counts}
    return dict(stage="test", method=method, seed=seed, test={"file": result})


def test_the_table_by_hand():
    runs = [tuned("GRPO", 1e-5, 0, 5, step20=0.5), tuned("SCOPE", 1e-5, 0.1, 5, step20=0.5)]
    for run in runs:
        for metrics in run["validation"].values():
            metrics |= {"pass@16": 0.25, "pass@16_stderr": 1, "entropy": 0.25, "d_collapse": 0.25}
    runs += [reported("GRPO", 0, [1, 1]), reported("SCOPE", 0, [2, 2])]
    runs += [reported("GRPO", 1, [1, 1]), reported("SCOPE", 1, [2, 2])]
    lines = study.page("x", runs).splitlines()
    cells = {}
    for line in lines:
        if line.startswith("|"):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            cells.setdefault(first, []).append(rest)
    assert cells["SCOPE"][0] == ["1e-05", "0.1", "20", "0.500", "0.250", "0.250", "0.250"]
    assert cells["base model"][0][:3] == ["2", "0.000 [0.000, 0.000]", "0.000 [0.000, 0.000]"]
    assert cells["GRPO"][1][1] == "0.250 [0.250, 0.250]"
    assert cells["GRPO"][1][3].startswith("0.150 [")
    figure = study.settings_picture(pyplot, runs)
    points = [axis.collections for axis in figure.axes]
    assert [len(panel) for panel in points] == [2, 2, 2]
    assert points[1][0].get_offsets().tolist() == [[0.25, 0.5]]
    pyplot.close(figure)
    assert cells["SCOPE − GRPO"] == [["+0.250 [+0.250, +0.250] *", "+0.000 [+0.000, +0.000]"]]


def test_every_run_of_the_studies_is_one_that_train_would_take():
    for name, described in study.STUDIES.items():
        lines = []
        for method in described.methods:
            tuning = study.tuning_lines(described, method)
            metrics = {str(step): {"pass@1": 0.0} for step in described.stops}
            chosen = [line | {"validation": metrics} for line in tuning]
            lines += tuning + study.test_lines(described, method, chosen)
        names = [study.run_name(name, line) for line in lines]
        assert len(set(names)) == len(names)
        for line, run in zip(lines, names):
            assert Path(run).name == run and " " not in run
            check_methods(load_config(study.overrides_of(described, line)))


def test_no_problem_of_the_toy_is_in_two_files(tmp_path):
    study.write_toy_problems(tmp_path)
    counts = {path.stem: len(read_jsonl(path)) for path in tmp_path.glob("*.jsonl")}
    assert counts == {f"train-{seed}": 64 for seed in (0, 1, 2, 3, 4, 1000, 1001)} | {
        "validation": 200,
        "4-numbers": 300,
        "3-numbers": 150,
        "5-numbers": 150,
        "larger": 150,
    }
    keys = [problem_key(row) for path in tmp_path.glob("*.jsonl") for row in read_jsonl(path)]
    assert len(set(keys)) == len(keys)
    for path in tmp_path.glob("*.jsonl"):
        sides = {is_heldout(**row) for row in read_jsonl(path)}
        assert sides == {"train" not in path.stem}


def test_bad_arguments_are_told_at_once(in_tmp):
    with pytest.raises(UserError, match="study=nothing: give one of miniature"):
        study.main(["nothing"])
    with pytest.raises(UserError, match="unknown key stepz"):
        study.main(["miniature", "stepz=3"])
