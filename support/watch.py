"""Which rank keeps the others waiting: it is named, with what it is at, and the run ends.

A rank's count goes up with every collective that it begins, so of ranks that wait for each other the one of the lowest
count is waited for. A thread of each rank writes count and phase into a file of the run's folder, which all nodes
share; whoever waits too long reads the others'. The collectives' own timeout names nobody, and is there for the rest.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.config import UserError
from support.files import replace_text
from support.signals import report

PATIENT = 4  # times as long where ranks differ much: one saves for all, evaluations end unevenly

_now = {"count": 0, "phase": "its start", "since": time.strftime("%H:%M:%S")}
_moved, _patience = time.monotonic(), PATIENT


def phase(name: str, *, patient: bool = False) -> None:
    """What this rank is at from here on, such as "the update of step 7"."""
    global _moved, _patience
    _now.update(phase=name, since=time.strftime("%H:%M:%S"))
    _moved, _patience = time.monotonic(), PATIENT if patient else 1


def collective() -> None:
    """Another one begins."""
    global _moved
    _now["count"] += 1
    _moved = time.monotonic()


@contextmanager
def watching(folder: Path, rank: int, size: int, limit: float, barrier) -> Iterator[None]:
    """While this lasts, a rank that is `limit` seconds behind another ends the run."""
    if size == 1:
        yield
        return
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    ended = threading.Event()
    threading.Thread(target=_watch, args=(folder, rank, size, limit, ended), daemon=True).start()
    try:
        yield
        if rank == 0:  # but not after a failure: ranks elsewhere still look at it
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        ended.set()


def _watch(folder: Path, rank: int, size: int, limit: float, ended: threading.Event) -> None:
    while not ended.wait(min(10.0, limit / 10)):
        now = dict(_now)
        with suppress(OSError, UserError):
            replace_text(folder / f"{rank}.json", json.dumps(now | {"heard": time.strftime("%H:%M:%S")}))
        waited = time.monotonic() - _moved
        if waited > limit * _patience and (line := behind(folder, now["count"], size)):
            report(f"rank {rank} of {size} has waited {waited:.0f} s in {now['phase']} for {line}: the run ends here "
                   f"(distributed_timeout={limit / 60:g} minutes)")
            os._exit(1)


def behind(folder: Path, count: int, size: int) -> str:
    """The ranks of the lowest count, if that is below this one."""
    found = {}
    for other in range(size):
        try:
            found[other] = json.loads((folder / f"{other}.json").read_text())
        except (OSError, ValueError):
            found[other] = {"count": -1, "phase": "its start", "since": "?", "heard": "never"}
    least = min(entry["count"] for entry in found.values())
    return ", ".join(f"rank {other}, which is in {entry['phase']} since {entry['since']} (last heard of at "
                     f"{entry['heard']})" for other, entry in found.items() if entry["count"] == least < count)
