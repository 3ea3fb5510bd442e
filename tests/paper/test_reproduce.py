"""paper.reproduce: a study in miniature, killed and resumed; its runs; and the committed tables."""

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, exit_code, fork, run_copy, write_jsonl

import train
from data import is_heldout, problem_key
from evaluate import pass_at_k
from paper import figures, reproduce, tables
from support.config import RunError, UserError, cast, load_config, read_defaults
from support.files import lock, read_jsonl

TABLES = [
    file
    for file in sorted((ROOT / "results").glob("*/table.md"))
    if file.parent.name in reproduce.STUDIES
]
MINIATURE = reproduce.Study(
    overrides="toy.layers=1 toy.hidden=16 toy.updates=3 toy.batch=8 prompts_per_step=4 "
    "group_size=4 max_new_tokens=12 evaluation.problems=3 evaluation.samples=16 seed={seed} "
    "countdown_problems=50 save_every=1 selection.fraction=0.3",
    test="evaluation.data=[auto,other.jsonl] evaluation.every=0",
    methods={name: reproduce.METHODS[name] for name in ("GRPO", "SCOPE")},
    rates=(0.01,),
    stops=(2, 3),
    seeds=(0, 1),
    tuning="evaluation.every=1 evaluation.samples_between=16",
    tuning_seeds=(1000,),
    coefs=(0.1, 0.3),
)
ONE_SETTING = MINIATURE._replace(
    methods={"GRPO": "selection.strategy=none", "Div": "objective=div optimizer.lr=0.03"},
    stops=(2,),
    seeds=(0,),
    tuning_seeds=(),
)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # rewards that a random model earns, so that it learns in three steps
    monkeypatch.setattr("rewards.is_correct", lambda problem, text, grader: text.count("1") > 1)
    copies = SimpleNamespace(run=run_copy, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(reproduce, "subprocess", copies)
    # a lock of tqdm could be held by another thread while a process is copied
    monkeypatch.setattr(reproduce, "tqdm", lambda lines, **settings: lines)
    monkeypatch.setattr(reproduce, "STUDIES", {"small": MINIATURE, "one": ONE_SETTING})
    monkeypatch.setattr(reproduce, "write_toy_problems", lambda folder: None)
    monkeypatch.setattr(figures, "picture", lambda path, *others: f"no {path}")
    rows = [{"numbers": [i, 2], "target": i + 2} for i in range(3, 6)]
    write_jsonl(Path("other.jsonl"), rows)
    return tmp_path


# ---------------------------------------------------------------- a study in miniature


def start_and_be_killed(arguments: list[str]) -> None:
    """Run the command in a copy of this process, until SIGKILL ends it in its second run."""

    def be_killed():
        os.setsid()
        save = train.checkpoint.save

        def save_and_die(run, step):
            save(run, step)
            if "SCOPE" in run.folder.name and step == 2:
                os.killpg(0, signal.SIGKILL)

        train.checkpoint.save = save_and_die
        reproduce.main(arguments)

    assert exit_code(fork(be_killed)) == -signal.SIGKILL
    with lock(Path("runs/reproduce.lock"), wait=True):  # its own copies are dead too
        pass


def without_times(runs: list[dict]) -> list[dict]:
    return [run | {"seconds": 0} for run in runs]


def test_a_study_in_miniature_killed_and_resumed(in_tmp):
    """A finished run is not repeated, and an unfinished one goes on from its checkpoint.

    Runs and table are those of an unbroken study.
    """
    start_and_be_killed(["small"])
    results = Path("results/small/runs.jsonl")
    assert {run["method"] for run in read_jsonl(results)} == {"GRPO"}
    assert not results.with_name("table.md").exists()
    logs = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*GRPO*.log")}
    assert logs

    reproduce.main(["small"])
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    killed = Path("runs/small-tuning-SCOPE-rate0.01-coef0.1-steps3-seed1000.log").read_text()
    assert killed.count("step 1:") == 1  # it went on after step 2
    runs = read_jsonl(results)
    text = results.with_name("table.md").read_text()
    check_tuning_runs([run for run in runs if run["stage"] == "tuning"])
    check_test_runs([run for run in runs if run["stage"] == "test"], runs)
    assert not list(Path("runs").glob("small-*/checkpoints"))
    assert text == tables.page("small", runs)
    for words in ("## auto", "## other", "SCOPE − GRPO", "base model"):
        assert words in text

    reproduce.main(["tables"])
    assert results.with_name("table.md").read_text() == text
    Path("runs").rename("first-runs")
    reproduce.main(["small", "out=again"])
    again = read_jsonl(Path("again/small/runs.jsonl"))
    assert without_times(again) == without_times(runs)


def check_tuning_runs(runs: list[dict]) -> None:
    settings = [("GRPO", 0.0), ("SCOPE", 0.1), ("SCOPE", 0.3)]
    assert [(run["method"], run["coef"]) for run in runs] == settings
    for run in runs:
        rows = read_jsonl(Path("runs") / run["run"] / "metrics.jsonl")
        assert run["validation"].keys() == {"2", "3"}
        for step, metrics in run["validation"].items():
            logged = [row for row in rows if row["step"] == int(step) and "eval/pass@1" in row]
            assert metrics["d_collapse"] == logged[0]["eval/d_collapse"]
        assert run["config"]["optimizer.lr"] == 0.01
        assert run["config"]["optimizer.warmup"] == 0.1
        assert run["config"]["selection.kl_coef"] == (run["coef"] or 0.1)


def check_test_runs(test: list[dict], runs: list[dict]) -> None:
    settings = {}
    for run in test:
        setting = (run["method"], run["rate"], run["coef"], run["steps"])
        settings.setdefault(setting, []).append(run["seed"])
    choices = [tables.choose(runs, metric) for metric in ("pass@1", "pass@16")]
    assert settings.keys() == {*choices[0].values(), *choices[1].values()}
    assert list(settings.values()) == [[0, 1]] * len(settings)
    for run in test:
        assert run["config"]["steps"] == run["steps"]
        assert run["config"]["seed"] == run["seed"]
        # the warm-up of the longest run
        assert run["config"]["optimizer.warmup"] * run["steps"] == pytest.approx(0.3)
        for result in run["test"].values():
            for model in ("base", "trained"):
                counts = np.array(result["correct"][model])
                assert len(counts) == 3 and result["samples"] == 16
                assert pass_at_k(16, counts, 4).mean() == pytest.approx(result[model]["pass@4"][0])


def test_a_study_with_one_setting(in_tmp):
    """Its methods may change what all have; nothing is chosen."""
    reproduce.main(["one", "jobs=2"])
    runs = read_jsonl(Path("results/one/runs.jsonl"))
    assert [(run["method"], run["stage"]) for run in runs] == [("GRPO", "test"), ("Div", "test")]
    assert [run["config"]["optimizer.lr"] for run in runs] == [0.01, 0.03]
    text = Path("results/one/table.md").read_text()
    assert "chosen" not in text and "Div − GRPO" in text


def test_a_failed_run_is_one_line_and_no_further_run_starts(in_tmp, monkeypatch):
    started = []

    def fail(command, **options):
        started.append(command)
        time.sleep(0.2)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=fail, STDOUT=None))
    with pytest.raises(RunError, match="a run failed: see runs/small-tuning-GRPO-.*.log"):
        reproduce.main(["small"])
    assert len(started) == 1 and not Path("results").exists()


def test_several_ranks_are_started_by_torchrun_on_their_own_gpus(tmp_path, monkeypatch):
    started = []

    def fail(command, env, **options):
        started.append((" ".join(command), env["CUDA_VISIBLE_DEVICES"]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=fail, STDOUT=None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    devices = reproduce.device_slots(2, 2)
    assert devices == ["4,5", "6,7"] and reproduce.device_slots(3, 2) == [*devices, "4,5"]
    with pytest.raises(RunError):
        reproduce.launch(tmp_path / "x", ["seed=1"], 2, devices)
    ((command, visible),) = started
    assert "-m torch.distributed.run --standalone --nproc_per_node=2 " in command
    assert command.endswith("train.py seed=1 name=x resume=auto") and visible == "6,7"
    assert devices == ["4,5"]


def test_bad_arguments_are_told_at_once(in_tmp):
    with pytest.raises(UserError, match="study=nothing: give one of small, one"):
        reproduce.main(["nothing"])
    with pytest.raises(UserError, match="unknown key stepz"):
        reproduce.main(["small", "stepz=3"])
    with lock(Path("runs/reproduce.lock")):
        with pytest.raises(UserError, match="runs is in use by process"):
            reproduce.main(["small"])


# ---------------------------------------------------------------- the studies and their results


def lines_of(study: reproduce.Study) -> list[dict]:
    """Return the lines of all runs that a study could have, whatever it chooses."""
    tuning = reproduce.tuning_lines(study)
    if not tuning:
        return reproduce.test_lines(study, [])
    lines = list(tuning)
    for line, step in itertools.product(tuning, study.stops):
        setting = line | {"validation": {step: {"pass@1": 0.0, "pass@16": 0.0}}}
        lines += reproduce.test_lines(only(study, line["method"]), [setting])
    return lines


def only(study: reproduce.Study, method: str) -> reproduce.Study:
    return study._replace(methods={method: study.methods[method]})


@pytest.mark.parametrize("name", reproduce.STUDIES)
def test_every_run_of_a_study_is_one_that_train_would_take(name):
    study = reproduce.STUDIES[name]
    lines = lines_of(study)
    names = {reproduce.run_name(name, line) for line in lines}
    assert len(names) == len({tuple(line.values()) for line in lines})
    assert all(Path(run).name == run and " " not in run for run in names)
    # rates, lambdas, steps and seeds are numbers: one of each is enough
    for line in {(line["method"], line["stage"]): line for line in lines}.values():
        train.check_methods(load_config(reproduce.overrides_of(study, line)))


def test_no_problem_of_the_toy_is_in_two_files(tmp_path):
    reproduce.write_toy_problems(tmp_path)
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


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.parent.name)
def test_committed_runs_are_those_that_would_be_run(file):
    """Each line has the settings of its study, and its choice follows from its tuning runs."""
    name = file.parent.name
    study = reproduce.STUDIES[name]
    usual = read_defaults()
    runs = read_jsonl(file.with_name("runs.jsonl"))
    tested = {
        method: [line["run"] for line in runs if line["method"] == method]
        for method in study.methods
    }
    for run in runs:
        line = reproduce.line_of(*(run[key] for key in list(run)[:6]))
        assert line.items() <= run.items() and reproduce.run_name(name, line) == run["run"]
        settings = dict(  # the last one of a key counts
            override.split("=", 1) for override in reproduce.overrides_of(study, line)
        )
        for key in settings.keys() & run["config"].keys() & usual.keys():
            expected = cast(key, settings[key], usual[key])
            assert run["config"][key] == expected, (run["run"], key)
    for method, names in tested.items():
        whole = [line["run"] for line in runs if line["stage"] == "test"]
        if study.tuning_seeds and names:
            lines = reproduce.test_lines(only(study, method), runs)
            assert {run for run in names if run in whole} <= {
                reproduce.run_name(name, line) for line in lines
            }


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.parent.name)
def test_committed_tables_follow_from_their_runs(file):
    runs = read_jsonl(file.with_name("runs.jsonl"))
    assert file.read_text() == tables.page(file.parent.name, runs)
