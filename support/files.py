"""Writes files and folders beside their place and renames them, so that none is half-written."""

import fcntl
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.config import UserError


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which then takes the place of `folder`."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def append_row(path: Path, row: dict) -> None:
    """Append a JSON object as one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """Read a file of one JSON object a line; [] if there is no file.

    A last line cut by a kill is left out.
    """
    rows = []
    if not path.exists():
        return rows
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(
                f"{path}, line {number} is not JSON: repair or delete that line"
            ) from None
    return rows


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, or raise UserError while another process holds it.

    With `wait`, wait for that process instead. The kernel releases the lock however a process ends,
    so a killed one never blocks the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{path.parent} is in use by {file.read() or 'another process'}: wait "
                "for it, or give another name="
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def fingerprint(content) -> str:
    """Return a checksum of JSON content, to tell one list of problems or settings from another."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def file_name(text: str) -> str:
    """Turn a path or name into one plain file name."""
    return text.strip("./").replace("/", "-")
