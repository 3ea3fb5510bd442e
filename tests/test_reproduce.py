"""reproduce.py, end to end on runs of a second: killed and resumed, and its committed tables."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
from helpers import ROOT, SMALL

import reproduce
import train
from support import checks, plots, processes, report
from support import config as configs

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

RESULTS = [name for name in reproduce.EXPERIMENTS if (ROOT / "results" / name / "table.md").is_file()]
NAMES: dict[str, dict] = {}
FIGURES: dict[str, dict] = {}
SETTINGS = dict(reproduce.OWN) | {"jobs": 1}


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_killed_and_resumed_the_same_table(tmp_path, monkeypatch):
    """Killed while its second run trains: it is taken up, the first not repeated, the table the same."""
    words = ["figure2", "seeds=1", "jobs=1", *SMALL, "steps=2"]
    command = [sys.executable, ROOT / "reproduce.py", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    out = tmp_path / "results" / "figure2"
    while not (out / "runs.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "runs.jsonl").read_text()
    assert len(before.splitlines()) == 1 and not (out / "table.md").exists()
    time.sleep(0.5)  # the runs end with it
    logs = {log: log.stat().st_mtime for log in (tmp_path / "runs").glob("*.log")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "picture", lambda path, draw: f"no {path}")  # they have a test of their own
    monkeypatch.delitem(reproduce.PARADIGMS, "RLIF")  # two processes less
    reproduce.main("figure2", words[3:], SETTINGS | {"seeds": 1, "jobs": 2})
    lines = lines_of(out)
    assert [(line["section"], line["row"]) for line in lines] == [("RLVR", "GRPO"), ("RLVR", "SCOPE")]
    for run in map(json.loads, before.splitlines()):
        log = tmp_path / "runs" / f"{run['run']}.log"
        assert log.stat().st_mtime == logs[log]  # not started again
    assert len(list((tmp_path / "runs" / "base-evaluations").glob("*.npz"))) == 5  # one a file, for all runs
    for i, line in enumerate(lines):  # the figures of an unbroken run of the same words; one was killed
        assert not (tmp_path / "runs" / line["run"] / "model").exists()
        train.main({key: line["config"].get(key, usual) for key, usual in configs.read_defaults().items()}
                   | {"name": f"unbroken{i}"})
        found = report.figures_of(tmp_path / "runs" / f"unbroken{i}")
        assert [line["figures"][who] for who in ("base", "trained")] == [found[who] for who in ("base", "trained")]
    text = (out / "table.md").read_text()
    reproduce.main("tables", [], SETTINGS)
    assert (out / "table.md").read_text() == text == reproduce.table("figure2", lines)
    assert reproduce.perform("figure2", words[3:], SETTINGS | {"seeds": 1}) == lines  # nothing left to run
    with pytest.raises(configs.UserError, match="holds runs of steps=2, not 3: give another out="):
        reproduce.perform("figure2", [*SMALL, "steps=3"], SETTINGS)
    lines[1]["run"] = "RLVR-SCOPE-0.03-seed9"  # of a seed that is not asked for now: no line is lost
    (out / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(processes, "in_parallel", lambda runs, slots, start: iter([]))
    assert reproduce.perform("figure2", words[3:], SETTINGS | {"seeds": 1}) == lines


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_every_row_is_a_run_that_train_would_take(name):
    rows = reproduce.EXPERIMENTS[name].rows(reproduce.lambdas_of(SETTINGS))
    labels = [reproduce.run_name(section, row, 0) for section, found in rows.items() for row in found]
    assert len(labels) == len(set(labels)) and list(rows) == ["RLVR", "RLIF"]
    for label, row in zip(labels, [row for found in rows.values() for row in found]):
        settings = {key: value for key, value in configs.training_keys(row.words).items() if key != "name"}
        assert NAMES.setdefault(label, settings) == settings  # of another experiment too
        assert [settings] == [other for other in NAMES.values() if other == settings]
    names = [(section, row.label, row.strength) for section, found in rows.items() for row in found]
    assert len(names) == len(set(names))


def test_bad_words_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("seeds=x", "stepz=3", "jobs=-1", "ranks=0"):
        with pytest.raises(configs.UserError, match=word.partition("=")[0]):
            configs.own_words([word], reproduce.OWN)
    with pytest.raises(configs.UserError, match="'figure9': give all, tables, or one of figure1, figure2"):
        reproduce.main("figure9", [], SETTINGS)
    for what, words, message in (
            ("table1", ["evaluation.data=auto"], "add a validation.jsonl"),
            ("figure2", ["evaluation.data=[a/x.jsonl,b/x.jsonl]"], "different names"),
            ("figure2", ["selection.kl_coef=0.1"], "give rlvr_lambda="),
            ("figure2", ["reward=token_entropy"], "reward=token_entropy: the rows of figure2 set it"),
            ("table2", ["objective=div"], "objective=div"), ("figure2", ["name=x"], "name=x")):
        with pytest.raises(configs.UserError, match=re.escape(message)), monkeypatch.context() as patch:
            patch.setattr(checks, "check_file", lambda *arguments: None)
            reproduce.main(what, words, SETTINGS)
    assert not list(tmp_path.iterdir())
    with processes.only_one(tmp_path / "runs" / "reproduce.lock"):
        with pytest.raises(configs.UserError, match="runs is in use by process"):
            reproduce.main("figure2", [], SETTINGS)
    command = [sys.executable, ROOT / "reproduce.py", "figure2", "seeds=x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "seeds=x" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def made_up(name: str, seeds: int) -> list[dict]:
    """Lines as if every run had ended; figures that tell them apart."""
    lines = []
    for section, rows in reproduce.EXPERIMENTS[name].rows(reproduce.lambdas_of(SETTINGS)).items():
        for i, row in enumerate(rows):
            for seed in range(seeds):
                found = {"pass@1": (i + seed) / 100, "pass@4": 0.5 + i / 100, "d_collapse": 0.1}
                trained = {"4-numbers": found, "validation": {**found, "pass@1": -abs((row.strength or 0) - 0.1)}}
                training = dict.fromkeys(("seconds", "tokens/s", "length", "mem_gb", "selection/fraction"), 0.1)
                figures = {"base": trained, "trained": trained, "training": training}
                lines.append({"section": section, "row": row.label, "strength": row.strength, "seed": seed,
                              "figures": figures, "config": {"data": "countdown"}})
    return lines


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_tables_of_whole_and_half_results(name):
    lines = made_up(name, 2)
    text = reproduce.table(name, lines)
    assert "## RLVR" in text and "## RLIF" in text and "validation" not in text.replace("of highest validation", "")
    for count in range(1, len(lines), 1 + len(lines) // 5):  # a killed experiment's, too
        assert reproduce.table(name, lines[:count]).startswith(f"# {name}")
        if draw := reproduce.EXPERIMENTS[name].draw:
            pyplot.close(draw(pyplot, lines[:count]))
            pyplot.close(draw(pyplot, lines[count:]))
    if name == "table1":
        best, common = re.split("^## ", text, flags=re.M)[1:3]
        assert "| SCOPE, 0.1 | 2 |" in best and "| SCOPE, 0.03 | 2 |" in common  # 0.1 is best on validation
        assert "| SCOPE, 0.1 − Uniform, 0.1 |" in best and "| Uniform, 0.1 − GRPO |" in best
        one = [line for line in lines if line["strength"] in (None, 0.03)]
        assert "highest validation" not in reproduce.table(name, one)  # nothing was chosen
    if name == "figure1":
        assert "| constant for a token, 0.1 − constant for a token, 0.05 | +0.020 ±0.000" in text
    if name == "table2":
        assert "| Div + SCOPE − Div | +0.010 ±0.000 (2/2) |" in text


@pytest.mark.parametrize("name", {reproduce.EXPERIMENTS[name].runs_of or name for name in RESULTS})
def test_names_of_committed_runs(name):
    """A row's name is what its runs are called; the same name has the same figures in every file."""
    rows = reproduce.EXPERIMENTS[name].rows(reproduce.lambdas_of(SETTINGS))
    names = {(section, row.label, row.strength): row for section, found in rows.items() for row in found}
    for line in lines_of(ROOT / "results" / name):
        row = names[line["section"], line["row"], line["strength"]]
        assert line["run"] == reproduce.run_name(line["section"], row, line["seed"])
        assert line["config"]["seed"] == line["seed"]
        assert FIGURES.setdefault(line["run"], line["figures"]) == line["figures"]


@pytest.mark.parametrize("name", RESULTS)
def test_committed_tables_follow_from_their_runs(name):
    lines = lines_of(ROOT / "results" / (reproduce.EXPERIMENTS[name].runs_of or name))
    assert (ROOT / "results" / name / "table.md").read_text() == reproduce.table(name, lines)


def test_tables_of_the_pages_are_those_of_the_results():
    found = [(file, block) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
             for file, block in re.findall(r"<!-- (results/\S+) -->\n(?:```\n)?((?:[^`\n].*\n)+)", page.read_text())]
    assert len(found) >= 4
    for file, block in found:
        assert block in (ROOT / file).read_text(), block
