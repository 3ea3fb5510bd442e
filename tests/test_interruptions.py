"""Tests of runs that are interrupted: signals, kills, and losses that are not finite."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SMALL, metrics_of, weights_of

import train
from support.config import RunError
from support.distributed import StopSignal
from tests import faults


def test_stopped_by_a_signal_and_resumed_is_the_unbroken_run(in_tmp, monkeypatch, capsys):
    """The step is finished and saved, although no checkpoint is due: here another rank has the
    signal.
    """
    arguments = [*SMALL, "save_every=4"]
    train.main([*arguments, "name=unbroken"])
    draw_problems = train.draw_problems

    def draw_and_signal(problems, step, *others):
        if step == 2:
            patch.setattr(train.World, "max", lambda world, mine: int(signal.SIGTERM))
        return draw_problems(problems, step, *others)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train, "draw_problems", draw_and_signal)
        train.main([*arguments, "name=stopped"])
    assert caught.value.code == 143
    assert [row["step"] for row in metrics_of("stopped")] == [0, 1, 2, 2, 3]
    printed = capsys.readouterr().out
    assert "step 3 is saved" in printed
    assert "name=stopped resume=true" in printed
    train.main(["name=stopped", "resume=true"])
    assert metrics_of("stopped") == metrics_of("unbroken")
    for key, weight in weights_of("stopped").items():
        assert torch.equal(weight, weights_of("unbroken")[key])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(capsys, number):
    stop_signal = StopSignal()
    os.kill(os.getpid(), number)
    assert stop_signal.number == number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert "a second signal stops at once" in capsys.readouterr().err


def test_a_signal_that_the_shell_ignores_stays_ignored():
    """As SIGINT under nohup or behind `&`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopSignal().restore()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_that_is_killed_before_a_file_operation_resumes_to_the_same_result(in_tmp):
    """The short form of `python tests/faults.py 79`, which kills before every file operation."""
    faults.main(4, in_tmp)


def test_signals_end_the_evaluation_after_the_last_step_at_once(in_tmp, monkeypatch):
    """The last checkpoint is there already, so that there is nothing to finish."""
    evaluate_policy = train.evaluate_policy
    before = signal.getsignal(signal.SIGINT)

    def spy(*arguments):
        assert signal.getsignal(signal.SIGINT) is before
        return evaluate_policy(*arguments)

    monkeypatch.setattr(train, "evaluate_policy", spy)
    train.main([*SMALL, "steps=1", "evaluation.every=0", "name=run"])
    assert metrics_of("run")[-1]["step"] == 1


def test_the_command_when_it_is_terminated(tmp_path):
    settings = "steps=100000 evaluation.every=0 save_every=100000 name=run".split()
    command = [sys.executable, ROOT / "train.py", *SMALL, *settings]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (line := process.stdout.readline()).startswith("step 2"):
        assert line, process.communicate()
    process.terminate()
    printed, errors = process.communicate(timeout=170)
    assert process.returncode == 143
    last = metrics_of(tmp_path / "runs" / "run")[-1]["step"]
    assert errors == (
        "note: stopping after this step, which is then saved; a second signal stops at once\n"
    )
    line = printed.splitlines()[-1]
    assert f"step {last} is saved" in line
    assert "name=run resume=true" in line
    assert (tmp_path / "runs" / "run" / "checkpoints" / f"step-{last:06d}").is_dir()


def test_losses_that_are_not_finite_end_the_run(in_tmp, monkeypatch, capsys):
    """From step 3 on the rate is far too high. The updates after it are skipped, and the third ends
    the run; the checkpoint of step 2 stays.
    """
    learning_rate = train.learning_rate

    def far_too_high(step, config):
        return learning_rate(step, config) if step < 2 else 1e20

    arguments = [*SMALL, "evaluation.every=0", "steps=7", "reward=trajectory_likelihood"]
    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(train, "learning_rate", far_too_high)
        train.main([*arguments, "name=broken"])
    assert caught.value.exit_code == 1
    assert "step 6: no finite loss and gradient in 3 steps in a row" in str(caught.value)
    rows = metrics_of("broken")[1:]
    assert [row["update/skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert rows[-1]["loss"] is None
    assert "is not finite" in capsys.readouterr().err


def test_only_bad_steps_in_a_row_end_the_run(in_tmp, monkeypatch):
    """A good update starts the count anew. After a bad step only the last one is saved."""
    skipped = iter([1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0])  # 0.5: one of two updates
    update = train.update

    def spy(run, rollout, *, on_policy):
        return update(run, rollout, on_policy=on_policy) | {"update/skipped": next(skipped)}

    saved = []
    monkeypatch.setattr(train, "update", spy)
    monkeypatch.setattr(train.checkpoint, "save", lambda run, step: saved.append(step))
    settings = ["steps=7", "save_every=1", "max_bad_steps=3", "evaluation.every=0"]
    train.main([*SMALL, *settings, "name=run"])
    assert saved == [3, 6, 7]
