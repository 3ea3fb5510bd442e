"""The library Math-Verify as a grader, in a process of its own that can be killed.

It hands answers to sympy, which a tower of powers keeps busy for ever, and its own time limits are alarms, which need
the main thread and do not stop everything. So a child process (this file run as a command) reads a JSON line
[gold, text] and writes true or false; where that takes longer than LIMIT it is killed, and the answer is wrong.
"""

import atexit
import json
import select
import signal
import subprocess
import sys

START, LIMIT = 120.0, 5.0  # seconds to import sympy on a busy machine, and for one verdict
LONGEST = 1000  # characters; what is longer is no final answer, and takes the library seconds or all memory

_child: subprocess.Popen | None = None


def is_equal(answer: str, gold: str) -> bool:
    """Whether Math-Verify finds the answer equal to the gold one; False if it cannot say in time."""
    if answer.strip() == gold.strip():
        return bool(gold.strip())
    if max(len(answer), len(gold)) > LONGEST:
        return False
    return text_is_equal(f"$\\boxed{{{answer}}}$", gold)


def text_is_equal(text: str, gold: str) -> bool:
    """The same of the answer that Math-Verify itself finds in a text, in a box or not."""
    global _child
    text = text[-20 * LONGEST :]  # where an answer stands
    if _child is None or _child.poll() is not None:
        _child = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True,  # -P: its own folder would hide the library
                                  start_new_session=True)  # a Ctrl-C is not meant for it
        atexit.register(_child.kill)
        if reply(_child, START) != "ready":
            from support.config import UserError  # here, for the child cannot import it

            raise UserError("reward.grader=math_verify: the library does not start: try "
                            "`python -c 'import math_verify'`")
    try:
        _child.stdin.write(json.dumps([f"$\\boxed{{{gold}}}$", text]) + "\n")
        _child.stdin.flush()
        verdict = reply(_child, LIMIT)
    except BrokenPipeError:
        verdict = None
    if verdict is None:
        stop()
    return verdict == "true"


def reply(child: subprocess.Popen, seconds: float) -> str | None:
    """The child's next line; None if it does not come in time, or never."""
    ready, _, _ = select.select([child.stdout], [], [], seconds)
    return (child.stdout.readline().strip() or None) if ready else None


def stop() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child.communicate()
        _child = None


def serve() -> None:
    """The child: one verdict a line, until its input ends with the parent's life."""
    from math_verify import parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that the library prints may look like a verdict
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(60)  # ends an orphan that hangs
        try:
            gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
            verdict = bool(verify(gold, answer, timeout_seconds=None))  # not symmetric: gold comes first
        except Exception:  # whatever the library raises on text that is no mathematics
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    serve()
