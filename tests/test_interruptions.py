"""Runs in a world that misbehaves: signals, numbers that are not finite, graders that stumble."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, metrics_of
from transformers import AutoModelForCausalLM

import step as steps
import train
from support import config as configs
from support import signals
from support.checks import Halted


def weights_of(name):
    return AutoModelForCausalLM.from_pretrained(Path("runs") / name / "model").state_dict()


@pytest.mark.parametrize("when", ["in step 3", "in an evaluation"])
def test_stopped_by_a_signal_and_resumed_is_the_unbroken_run(in_tmp, monkeypatch, capsys, when):
    """A step is finished and saved; what was saved before an evaluation is evaluated later."""
    words = [*SMALL, "save_every=4"]
    train.main(configs.training_keys([*words, "name=whole"]))
    problems, evaluate = steps.step_problems, train.evaluate.evaluate

    def stopped(all, step, **named):
        if step == 2:
            monkeypatch.setattr(signals, "asked", signal.SIGTERM)  # as its handler does
        return problems(all, step, **named)

    def stopped_at_once(*arguments, title, **named):
        if title == "evaluation":
            raise SystemExit(143)
        return evaluate(*arguments, title=title, **named)

    with monkeypatch.context() as patch:
        if when == "in step 3":
            patch.setattr(steps, "step_problems", stopped)
        else:
            patch.setattr(train.evaluate, "evaluate", stopped_at_once)
        with pytest.raises(SystemExit) as ended:
            train.main(configs.training_keys([*words, "name=stopped"]))
    assert ended.value.code == 143
    assert [row["step"] for row in metrics_of("stopped")] == ([0, 1, 2, 2, 3] if when == "in step 3" else [0, 1, 2])
    monkeypatch.setattr(signals, "asked", 0)
    train.main(configs.training_keys(["name=stopped", "resume=true"]))
    assert metrics_of("stopped") == metrics_of("whole")


def test_a_real_run_that_is_terminated(tmp_path):
    """SIGTERM to the command itself."""
    command = [sys.executable, ROOT / "train.py", *SMALL, "steps=100000", "evaluation.every=0", "save_every=100000",
               "name=run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (line := process.stdout.readline()).startswith("step 2"):
        assert line, process.communicate()
    process.terminate()
    _, told = process.communicate(timeout=100)
    assert process.returncode == 143
    last = len(metrics_of(tmp_path / "runs" / "run")) - 1
    assert told == f"SIGTERM: step {last} is finished and saved; to go on: the same command with " \
                   "name=run resume=true\n"


def test_steps_without_a_finite_loss_end_the_run(in_tmp, monkeypatch):
    """From step 3 on the rate is far too high. After three steps without an update the run ends; its saves stay."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, config: rate(step, config) if step < 2 else 1e20)
    words = [*SMALL, "save_every=2", "keep=9", "evaluation.every=0", "steps=7", "reward=trajectory_likelihood"]
    with pytest.raises(Halted, match="step 6: 3 steps in a row .* lower optimizer.lr") as ended:
        train.main(configs.training_keys([*words, "name=broken"]))
    assert ended.value.status == 1 and "\n" not in str(ended.value)
    rows = metrics_of("broken")[1:]
    assert [row["update/skipped"] for row in rows] == [0, 0, 0, 1, 1, 1] and rows[-1]["loss"] is None
    saves = Path("runs/broken/checkpoints")
    assert sorted(path.name for path in saves.iterdir()) == ["step-000002", "step-000004"]
    shutil.rmtree(saves / "step-000004")
    monkeypatch.setattr(train, "learning_rate", rate)
    train.main(configs.training_keys(["name=broken", "resume=true"]))
    train.main(configs.training_keys([*words, "name=whole"]))
    assert metrics_of("broken") == metrics_of("whole")
    for name, weight in weights_of("whole").items():
        assert torch.equal(weight, weights_of("broken")[name])


def test_out_of_memory_is_told_in_one_line(in_tmp, monkeypatch):
    def update(*arguments, **named):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(steps, "update", update)
    with pytest.raises(Halted, match="^out of memory: .*micro_batch_tokens.*rollout.batch_size.*resume=true") as ended:
        train.main(configs.training_keys([*SMALL, "name=broken"]))
    assert ended.value.status == 1 and "\n" not in str(ended.value)


def test_a_grader_that_stumbles_ends_no_run(in_tmp, monkeypatch, capsys):
    """The completion counts as wrong; a warning names it, once for each kind of error. No group differs: told too."""
    def grader(problem, text, name):
        raise ZeroDivisionError("inside the grader")

    monkeypatch.setattr("data.is_correct", grader)
    train.main(configs.training_keys([*SMALL, "steps=2", "name=graded"]))
    printed = capsys.readouterr().out
    assert printed.count("the grader raised ZeroDivisionError: inside the grader, at {'numbers'") == 1
    assert all(row["reward/accuracy"] == 0 for row in metrics_of("graded") if "loss" in row)
    assert printed.count("no group's rewards differ: this step teaches nothing") == 2
