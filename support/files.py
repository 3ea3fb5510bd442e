"""Files and folders written whole or not at all, whenever a run is killed; and fingerprints."""

import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def remove(path: Path) -> None:
    """Whatever it is, if it is there; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)  # its writer may have renamed it meanwhile
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    unfinished.rename(path)


def append_line(path: Path, line: str) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log; a last one without its end does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, which then takes the place of `folder`."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    remove(folder)
    unfinished.rename(folder)


# ---------------------------------------------------------------- fingerprints


def checksum(file: Path) -> str:
    """CRC-32: sha256 guards against forgers, whom we do not have."""
    return f"{zlib.crc32(file.read_bytes()):08x}"


def json_sum(content) -> str:
    """Tells one list of problems from another."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def file_name(text: str) -> str:
    """A path or name as one plain file name."""
    return text.strip("./").replace("/", "-")
