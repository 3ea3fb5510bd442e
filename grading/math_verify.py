"""Grades with the library Math-Verify, in a child process that can be killed.

The library hands answers to sympy, which never finishes a tower of powers, and its own time limits
are alarms, which need the main thread and do not stop everything. So this file also runs as a
command, the child: it reads a JSON line [gold, text] and writes true or false.
"""

import atexit
import json
import select
import signal
import subprocess
import sys

START = 120.0  # seconds to import sympy, on a busy machine
LIMIT = 5.0  # seconds for one verdict; then the child is killed, and the answer counts as wrong

_child = None  # the running child process


class GraderError(RuntimeError):
    """The grader does not work on this machine."""


def grade(text: str, gold: str) -> bool:
    r"""Return whether the answer that the library finds in a completion equals the gold answer.

    The answer may stand in a \boxed{} or not. Raises GraderError if the library does not start.
    """
    global _child
    if _child is None or _child.poll() is not None:
        _child = start()
    try:
        request = [f"$\\boxed{{{gold}}}$", text[-20_000:]]
        _child.stdin.write(json.dumps(request) + "\n")
        _child.stdin.flush()
        verdict = read_line(_child, LIMIT)
    except BrokenPipeError:
        verdict = ""
    if not verdict:
        stop()
    return verdict == "true"


def start() -> subprocess.Popen:
    """Start the child and wait until it has imported the library."""
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],  # -P: this file's folder would hide the library
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )
    atexit.register(child.kill)
    if read_line(child, START) != "ready":
        child.kill()
        raise GraderError("the library does not start: try `python -c 'import math_verify'`")
    return child


def read_line(child, seconds: float) -> str:
    """Return the child's next line, "" if it does not come in time."""
    ready, _, _ = select.select([child.stdout], [], [], seconds)
    return child.stdout.readline().strip() if ready else ""


def stop():
    """Kill the child; the next verdict starts another one."""
    global _child
    if _child is not None:
        _child.kill()
        _child.communicate()
        _child = None


def serve():
    """Run the child: write one verdict for each line, until the parent closes the input."""
    from math_verify import parse, verify

    replies = sys.stdout
    sys.stdout = sys.stderr  # what the library prints must not look like a verdict
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(60)  # ends a child that hangs after its parent has died
        try:
            gold, answer = [parse(text, parsing_timeout=None) for text in json.loads(line)]
            verdict = bool(verify(gold, answer, timeout_seconds=None))  # the gold answer is first
        except Exception:  # the library raises anything on text that is no mathematics
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    serve()
