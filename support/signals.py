"""How a process ends: by a line, not a traceback.

SIGTERM and SIGINT: what is in hand is finished first (`finish`); a second signal ends at once. A thread of its own
hears them, for the main thread may be in a long product or wait for other ranks. Standard library only: it listens
before torch is imported.
"""

import json
import os
import signal
import sys
import threading
import time

TOGETHER = 1.0  # seconds: a launcher and its launcher may both pass one signal on

asked = 0  # the signal that came first
way_on = ""  # what to do to go on, for the last line
_task, _since = "", 0.0
_parent, _bound = os.getppid(), False


def listen() -> None:
    """From here on this process ends by a line. In the main thread, once."""
    if signal.getsignal(signal.SIGTERM) is _noted:
        return
    end_with_parent(also=False)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
            signal.signal(number, _noted)
    threading.Thread(target=_hear, args=(reader,), daemon=True).start()


def finish(task: str) -> None:
    """A signal from here on lets this be finished, such as "step 7"; "": nothing, it ends at once."""
    global _task
    _task = task
    if asked and not task:
        _end(asked)


def leave(number: int, done: str) -> None:
    """The end that a signal asked for, with what has been done."""
    _say(f"{signal.Signals(number).name}: {done}{_hint()}")
    raise SystemExit(128 + number)


def report(line: str) -> None:
    """On stderr, and where torchrun looks for the last words of its own long report."""
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(file, "w") as opened:
            json.dump({"message": {"message": line, "extraInfo": extra}}, opened)


def _noted(number, frame) -> None:
    """Python's own part: nothing, for the thread has read the number."""


def _hear(reader: int) -> None:
    global asked, _since
    while True:
        number = os.read(reader, 1)[0]
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        time.sleep(0.1)  # a parent that this comes from may have a thread or two left
        if asked and not orphaned() and time.monotonic() - _since < TOGETHER:
            continue
        if asked or not _task or orphaned():
            _end(number)
        asked, _since = number, time.monotonic()
        _say(f"{signal.Signals(number).name}: finishing {_task}, then saving; again to stop at once")


def end_with_parent(also: bool = True) -> None:
    """A killed parent takes this process along: torchrun its ranks, and reproduce.py its runs, or the next one would
    start the same work a second time. (Of the main thread; `also` False: only where the parent has seen to it.)"""
    global _bound
    if sys.platform == "linux":
        import ctypes

        kernel, number = ctypes.CDLL(None), ctypes.c_int()
        if also:
            kernel.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        kernel.prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        _bound = number.value != 0


def orphaned() -> bool:
    """Whether the parent that this process was to end with is gone."""
    return _bound and os.getppid() != _parent


def _end(number: int) -> None:
    """Here and now: files are written whole or not at all, so nothing needs to be cleaned up."""
    why = "its parent has ended" if orphaned() else signal.Signals(number).name
    _say(f"{why}: stopped{_hint()}")
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)  # whoever should read it may have stopped reading
    os._exit(128 + number)


def _hint() -> str:
    return f"; to go on: {way_on}" if way_on else ""


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        newline = "\n" * sys.stderr.isatty()  # below a progress bar
        os.write(2, f"{newline}{line}\n".encode())  # no lock that another thread may hold
