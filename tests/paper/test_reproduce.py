"""paper.reproduce: killed and resumed in miniature; its runs; and the committed tables."""

import json
import os
import re
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from helpers import ROOT, run_copy

import train
from data import countdown
from paper import figures, reproduce, tables
from support import config as configs
from support.config import RunError, UserError, cast, load_config, nest, read_defaults
from support.files import lock, read_jsonl

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

TABLES = sorted((ROOT / "results").glob("**/table.md"))
RUNS = sorted((ROOT / "results").glob("**/runs.jsonl"))
SMALL = (
    "toy.layers=1 toy.hidden=16 toy.updates=3 toy.batch=8 prompts_per_step=4 group_size=4 "
    "max_new_tokens=12 evaluation.problems=3 evaluation.samples=4 countdown_problems=50 steps=3 "
    "save_every=1 selection.fraction=0.3 optimizer.lr=0.01 optimizer.warmup=0"
).split()


def all_runs(name: str, seeds: int = 10) -> dict:
    return reproduce.list_runs(name, load_config([f"seeds={seeds}"], reproduce.SETTINGS))


# ---------------------------------------------------------------- killed and resumed


def start_and_be_killed(arguments: list[str]) -> None:
    """Run the command in a copy of this process, until SIGKILL ends it in its second run."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            save = train.checkpoint.save

            def save_and_die(run, step):
                save(run, step)
                if "SCOPE" in run.folder.name and step == 2:
                    os.killpg(0, signal.SIGKILL)

            train.checkpoint.save = save_and_die
            reproduce.main(arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_killed_and_resumed_the_same_table(tmp_path, monkeypatch):
    """A finished run is not repeated, and an unfinished one goes on from its checkpoint.

    The table is that of unbroken runs.
    """
    monkeypatch.chdir(tmp_path)
    # rewards that a random model earns, so that it learns in three steps
    monkeypatch.setattr(reproduce, "PARADIGMS", {"RLIF": "self_certainty"})
    monkeypatch.setattr(figures, "picture", lambda path, *others: f"no {path}")
    copies = SimpleNamespace(run=run_copy, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(reproduce, "subprocess", copies)
    # a lock of tqdm could be held by another thread while a process is copied
    monkeypatch.setattr(reproduce, "tqdm", lambda lines, **settings: lines)
    arguments = ["figure2", "seeds=1", *SMALL]
    first, second = "RLIF-INTUITOR-seed0", "RLIF-SCOPE-0.3-seed0"
    start_and_be_killed(arguments)
    out = Path("results/figure2")
    assert [run["run"] for run in read_jsonl(out / "runs.jsonl")] == [first]
    assert not (out / "table.md").exists()
    log = Path(f"runs/results-{first}.log")
    written = log.stat().st_mtime_ns

    reproduce.main(arguments)
    assert log.stat().st_mtime_ns == written  # the first run was not started again
    # the second one went on after step 2
    assert Path(f"runs/results-{second}.log").read_text().count("step 1:") == 1
    runs = read_jsonl(out / "runs.jsonl")
    assert [run["run"] for run in runs] == [first, second]
    for run in runs:
        assert not Path(f"runs/results-{run['run']}/model").exists()
        config = nest(read_defaults() | run["config"] | {"name": f"whole-{run['run']}"})
        monkeypatch.setattr(train, "load_config", lambda arguments, config=config: config)
        train.main([])
        whole = tables.summarise_run(Path(f"runs/{config.name}"))
        for model in ("base", "trained"):
            assert run["figures"][model] == whole[model]
    assert runs[0]["figures"]["trained"] != runs[1]["figures"]["trained"]
    text = (out / "table.md").read_text()
    assert text == tables.experiment_page("figure2", runs, ("baseline",))
    reproduce.main(["tables"])
    assert (out / "table.md").read_text() == text

    with pytest.raises(UserError, match="results holds .* with {'steps': 3}: give another out="):
        reproduce.main([*arguments, "steps=2"])
    # a seed that is not asked for: it is not lost
    other = [*runs, runs[1] | {"run": "RLIF-SCOPE-0.3-seed9"}]
    (out / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in other))
    reproduce.main(arguments)
    assert read_jsonl(out / "runs.jsonl") == other
    # runs of another experiment, under its labels: they are not repeated
    Path("results/table2").mkdir()
    lines = "".join(json.dumps(run | {"row": "of Table 2"}) + "\n" for run in runs)
    Path("results/table2/runs.jsonl").write_text(lines)
    (out / "runs.jsonl").unlink()
    reproduce.main(arguments)
    assert read_jsonl(out / "runs.jsonl") == runs
    assert log.stat().st_mtime_ns == written


def test_a_failed_run_is_one_line_and_no_further_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []

    def fail(command, **options):
        started.append(command)
        time.sleep(0.2)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=fail, STDOUT=None))
    with pytest.raises(RunError, match="a run failed: see runs/results-RLVR-GRPO-seed0.log"):
        reproduce.main(["figure2", *SMALL])
    assert len(started) <= 2 and not Path("results").exists()


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
    assert devices == ["4,5", "6,7"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["figure9"], "'figure9': give all, tables, or one of figure1, figure2"),
        (["table1", "evaluation.data=auto"], "add a validation.jsonl"),
        (["figure2", "selection.kl_coef=0.1"], "give rlvr_lambda="),
    ],
)
def test_bad_arguments_are_told_at_once(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        reproduce.main(arguments)
    assert not list(tmp_path.iterdir())


def test_only_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock(Path("runs/reproduce.lock")):
        with pytest.raises(UserError, match="runs is in use by process"):
            reproduce.main(["figure2"])


def test_countdown_files(tmp_path):
    """Problems that training never sees; validation has none of 4-numbers."""
    kind = {"numbers": 4, "largest": 20, "limit": 99}
    files = reproduce.countdown_files(tmp_path, kind)
    problems = {Path(file).stem: read_jsonl(Path(file)) for file in files}
    assert [len(rows) for rows in problems.values()] == [100, 64, 64, 64, 64]
    assert {len(row["numbers"]) for row in problems["5-numbers"]} == {5}
    assert max(max(row["numbers"]) for row in problems["larger"]) > 20
    training = countdown(1000, heldout=False, **kind)
    for name in ("4-numbers", "validation"):
        assert not [row for row in problems[name] if row in training]
    assert not [row for row in problems["validation"] if row in problems["4-numbers"]]


# ---------------------------------------------------------------- the runs and their tables


def test_every_row_is_a_run_that_train_would_take(monkeypatch):
    """Two rows of any experiments have the same name exactly if they have the same settings."""
    monkeypatch.setattr(configs, "read_yaml", cache(configs.read_yaml))
    settings = {}
    for name, experiment in reproduce.EXPERIMENTS.items():
        rows = experiment.rows("RLVR", 0.03) + experiment.rows("RLIF", 0.3)
        runs = all_runs(name, seeds=1)
        assert len(runs) == len(rows)
        for run, (_, overrides) in runs.items():
            assert Path(run).name == run and " " not in run
            config = load_config(overrides)
            train.check_methods(config)
            assert settings.setdefault(run, config) == config
    for run, config in settings.items():
        assert [other for other in settings if settings[other] == config] == [run]


def made_up(name: str) -> list[dict]:
    """Return lines as if every run of two seeds had ended, with figures that tell them apart."""
    training = dict.fromkeys(("seconds", "tokens/s", "length", "mem_gb"), 0.1)
    lines = []
    runs = all_runs(name, seeds=2)
    for i, (line, _) in enumerate(runs.values()):
        row = i % (len(runs) // 4)  # of two sections with two seeds
        metrics = {"pass@1": (row + line["seed"]) / 100, "pass@4": 0.5, "d_collapse": 0.1}
        validation = metrics | {"pass@1": -abs((line["strength"] or 0) - 0.1)}
        files = {"4-numbers": metrics, "validation": validation}
        share = {"selection/fraction": line["strength"] or 0.0}
        numbers = {"base": files, "trained": files, "training": training | share}
        lines.append(line | {"figures": numbers})
    return lines


def page(name: str, runs: list[dict]) -> str:
    """Return table.md without the spaces that align its columns."""
    text = tables.experiment_page(name, runs, reproduce.EXPERIMENTS[name].references)
    return re.sub(" +", " ", text)


SHOWN = {
    # 0.1 is best on validation, and 0.03 is the common strength
    "table1": ["| SCOPE, 0.1 | 2 |", "| SCOPE, 0.1 − Uniform, 0.1 |", "| Uniform, 0.03 − GRPO |"],
    "figure1": ["| constant for a token, 0.1 − constant for a token, 0.05 | +0.020 ±0.000 (2/2) |"],
    "table2": ["| Div + SCOPE − Div | +0.010 ±0.000 (2/2) |"],
}


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_tables_and_pictures_of_whole_and_half_results(name):
    runs = made_up(name)
    text = page(name, runs)
    assert "## RLVR" in text and "## RLIF" in text
    assert "validation" not in text.replace("highest validation", "")
    for line in SHOWN.get(name, []):
        assert line in text
    pair = len(all_runs(name, seeds=1))
    for count in (pair, 3 * pair // 4, len(runs)):  # also of an experiment that was killed
        assert page(name, runs[:count]).startswith(f"# {name}")
        if draw := reproduce.EXPERIMENTS[name].draw:
            pyplot.close(draw(pyplot, runs[:count]))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_committed_runs_are_those_that_would_be_run(file, tmp_path, monkeypatch):
    """Each line is called as its row says, and has its settings and those of all runs."""
    monkeypatch.chdir(tmp_path)
    name = file.parent.name
    common = reproduce.common_overrides([name], [], load_config([], reproduce.SETTINGS))
    runs = all_runs(name)
    usual = read_defaults()
    for run in read_jsonl(file):
        line, overrides = runs[run["run"]]
        assert line == {key: run[key] for key in line}
        settings = dict(
            override.split("=") for override in common + overrides
        )  # the last one counts
        for key in settings.keys() & run["config"].keys():
            assert run["config"][key] == cast(key, settings[key], usual[key]), (run["run"], key)
        assert run["config"].keys() <= usual.keys() and run["config"]["seed"] == run["seed"]


def test_the_same_run_has_the_same_figures_in_every_file():
    found = {}
    for file in (ROOT / "results").glob("*/runs.jsonl"):
        for run in read_jsonl(file):
            assert found.setdefault(run["run"], run["figures"]) == run["figures"]


@pytest.mark.parametrize("file", TABLES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_committed_tables_follow_from_their_runs(file):
    name = file.parent.name
    experiment = reproduce.EXPERIMENTS[name]
    runs = read_jsonl(file.parents[1] / (experiment.runs_of or name) / "runs.jsonl")
    assert file.read_text() == tables.experiment_page(name, runs, experiment.references)
