"""How processes end: real ones, without torch, that are sent real signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

HEAD = "import os, signal, subprocess, sys, time\nfrom support import signals\n"
STEPS = HEAD + """
signals.listen()
signals.way_on = "resume=true"
for step in range(1, 100):
    signals.finish(f"step {step}")
    print(step, flush=True)
    time.sleep(float(sys.argv[1]))
    if signals.asked:
        signals.leave(signals.asked, f"step {step} is finished and saved")
    signals.finish("")
"""


def start(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_be_finished(number, code):
    process, name = start(STEPS, "0.6"), signal.Signals(number).name
    process.stdout.readline()
    process.send_signal(number)
    process.send_signal(number)  # from its launcher's launcher: the same one
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert told.splitlines() == [f"{name}: finishing step 1, then saving; again to stop at once",
                                 f"{name}: step 1 is finished and saved; to go on: resume=true"]


def test_a_second_signal_stops_at_once():
    process = start(STEPS, "50")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130 and told.splitlines()[1:] == ["SIGINT: stopped; to go on: resume=true"]


def test_without_a_step_in_hand_a_signal_stops_at_once():
    process = start(HEAD + "signals.listen()\nprint('on', flush=True)\ntime.sleep(50)\nprint('no')\n")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=20)
    assert process.returncode == 130 and told == "SIGINT: stopped\n" and not printed


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_a_rank_ends_with_a_launcher_that_was_killed(tmp_path):
    """At once, whatever it has in hand."""
    rank = HEAD + "signals.listen()\nsignals.end_with_parent()\nsignals.finish('step 1')\nprint('on', flush=True)\n" \
                  "time.sleep(50)\n"
    launcher = start(HEAD + f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True).wait()")
    launcher.stdout.readline()
    launcher.kill()
    started = time.monotonic()
    _, told = launcher.communicate(timeout=30)  # ends when the rank has closed what it printed to
    assert told == "its parent has ended: stopped\n" and time.monotonic() - started < 20


def test_torchrun_finds_the_last_words(tmp_path):
    code = HEAD + "from support.config import UserError, one_line_errors\nwith one_line_errors():\n" \
                  "    raise UserError('seed=x: give a number')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    assert (done.returncode, done.stderr) == (2, "error: seed=x: give a number\n")
    found = json.loads((tmp_path / "error.json").read_text())["message"]
    assert found["extraInfo"]["py_callstack"] == "error: seed=x: give a number" and found["extraInfo"]["timestamp"]
