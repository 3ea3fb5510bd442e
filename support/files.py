"""Files, written so that a kill, a power failure or a full disk leaves the old content or the new, whole."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.config import UserError

# ---------------------------------------------------------------- written whole, and for good


class DiskError(UserError):
    """The disk does not take what is to be written: nobody's typing mistake."""

    status = 1


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns what a full or failing disk raises while `path` is written into one line."""
    try:
        yield
    except Exception as error:
        own = any(sign in str(error) for sign in ("os error", "inline_container"))  # safetensors' words, and torch's
        if isinstance(error, UserError) or not (isinstance(error, OSError) or own):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DiskError(f"cannot write {path}: {reason}; make room and give the command again, a run's with "
                        "resume=true: nothing that was saved is lost") from None


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk now: a power failure leaves them."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Whatever it is, if it is there; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)  # its writer may have renamed it meanwhile
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with written(path):
        try:
            unfinished.write_text(text)
            sync(unfinished)
            unfinished.rename(path)
            sync(path.parent)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """At the end of a file, whole or not at all."""
    with written(path), path.open("ab", buffering=0) as file:
        before, content = file.tell(), f"{line}\n".encode()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the disk took a part
        except OSError:
            file.truncate(before)
            raise


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log; a last one without its end, by a power failure, does not count."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not (isinstance(rows[-1], dict) and isinstance(rows[-1].get("step"), int)):
            raise UserError(f"{path}, line {number}, is damaged: {line[:60]!r}; mend or delete that line")
    return rows


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, which then takes the place of `folder`."""
    unfinished, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    with written(folder):
        remove(unfinished)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for path in (*unfinished.rglob("*"), unfinished):
                sync(path)
            remove(old)
            if folder.exists() or folder.is_symlink():
                folder.rename(old)
            unfinished.rename(folder)
            sync(folder.parent)
        except Exception:
            remove(unfinished)
            raise
        remove(old)


# ---------------------------------------------------------------- fingerprints


def checksum(file: Path) -> str:
    """CRC-32, for it finds every flipped bit and cut at the speed of a disk; sha256 guards against forgers, whom we
    do not have, and takes minutes for what a 7B model saves."""
    total = 0
    with file.open("rb") as opened:
        while piece := opened.read(2**22):
            total = zlib.crc32(piece, total)
    return f"{total:08x}"


def json_sum(content) -> str:
    """Tells one list of problems from another."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def file_name(text: str) -> str:
    """A path or name as one plain file name."""
    return text.strip("./").replace("/", "-")
