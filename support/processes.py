"""Other processes: runs in parallel, and locks against a second one; and what software a result came from."""

import fcntl
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from support.config import UserError


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """The command in the background, what it prints in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


@contextmanager
def only_one(file: Path, rank: int = 0, *, wait: bool = False) -> Iterator[None]:
    """Refused while another process holds the file, by the pid and host it wrote there, or begun when it ends; of
    several ranks rank 0 holds it for all. The kernel lets go of it however a process ends, so that what a killed one
    leaves locks nobody out."""
    if rank:
        yield
        return
    made = [folder for folder in file.parents if not os.path.exists(folder)]  # the deepest first
    lock = taken(file, wait)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.close()
        with suppress(OSError):  # nothing was written there: no trace is left
            for folder in made:
                folder.rmdir()


def taken(file: Path, wait: bool):
    """The file, locked."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.open("a+")
        except OSError as error:
            raise UserError(f"cannot write to {file.parent}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            if not wait:
                raise UserError(f"{file.parent} is in use by {holder} (it holds {file}): wait for it, or end "
                                "it") from None
            print(f"note: waiting for {holder}, which holds {file}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: better trained than refused
            print(f"note: {file} cannot be locked ({error.strerror}): start nothing else on {file.parent}",
                  file=sys.stderr)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                break
        lock.close()  # whoever held it has just ended and removed it
    lock.truncate(0)
    os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


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
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "device": device}
