"""Other processes: started so that they end with this one; and what software a result came from."""

import fcntl
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from support.config import UserError


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """The command in the background, what it prints in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    """In the child: a killed parent takes it along, or the next parent would start the same work a second time."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def only_one(file: Path):
    """Refused while another process holds the file; whoever ends, however it ends, lets go."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another command is at work on the same runs ({file}): wait for it, or end it") from None
        yield


def in_parallel(jobs: list, slots: int, begin: Callable) -> Iterator[tuple]:
    """Begins the jobs in order, `slots` at a time: `begin(job, slot)` returns a process. Yields (job, exit status) as
    they end. Whoever leaves the loop early ends the others."""
    waiting, free, running = list(jobs), list(range(slots)), {}
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.pop(0), free.pop(0)
                running[begin(job, slot)] = job, slot
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, slot = running.pop(process)
                free.append(slot)
                yield job, process.returncode
    finally:
        for process in running:
            process.terminate()


def versions() -> dict[str, str]:
    """The commit of this repository, and what it ran on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"commit": git.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "device": device}
