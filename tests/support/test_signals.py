"""How processes end: real ones, without torch, that are sent real signals."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

STEP = """
import signal, sys, time
from support import signals
signals.hear(signals.note)
print("on", flush=True)
while not signals.asked:
    time.sleep(0.01)
print("heard", flush=True)
if sys.argv[1:]:
    time.sleep(50)
sys.exit(128 + signals.asked)
"""


def start(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_be_finished(number, code):
    process = start(STEP)
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("heard\n", "") and process.returncode == code


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(second):
    process = start(STEP, "and goes on")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.stdout.readline()
    process.send_signal(second)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == -second


def test_torchrun_finds_the_last_words(tmp_path):
    code = "from support.config import UserError, one_line_errors\nwith one_line_errors():\n" \
           "    raise UserError('seed=x: give a number')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    assert (done.returncode, done.stderr) == (2, "error: seed=x: give a number\n")
    found = json.loads((tmp_path / "error.json").read_text())["message"]
    assert found["extraInfo"]["py_callstack"] == "error: seed=x: give a number" and found["extraInfo"]["timestamp"]
