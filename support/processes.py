"""Other processes: started so that they end with this one; and what software a result came from."""

import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """The command in the background, what it prints in `log`."""
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    """In the child: a killed parent takes it along, or the next parent would start the same work a second time."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
