"""Files: local, on the hub or on the web to read; written so that a kill leaves the old content or the new."""

import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.config import UserError, is_remote


def read_text(path: str) -> str:
    """The text of a local file, or of one on the hub (hf://datasets/owner/name/file) or the web (https://...)."""
    try:
        if path.startswith("hf://"):
            from huggingface_hub import HfFileSystem  # transformers brings it along

            return HfFileSystem().read_text(path, encoding="utf-8-sig")
        if is_remote(path):
            from urllib.request import urlopen

            with urlopen(path, timeout=30) as answer:
                return answer.read().decode("utf-8-sig")
        return Path(path).read_text(encoding="utf-8-sig")  # -sig: some editors put a mark in front
    except Exception as error:  # whatever the hub's client, the network and the disk raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        mend = "check the name and the network, or download the file and give its local path"
        if not is_remote(path):
            mend = "give a JSONL file in UTF-8"
        raise UserError(f"cannot read {path} ({reason}): {mend}") from None


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.rename(path)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, which then takes the place of `folder`."""
    unfinished, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)  # a kill between these two renames leaves `old`, which checkpoint.load finds
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(model: str) -> str:
    """Tells one set of weights from another under the same path: sizes and the beginning of each file."""
    marks = []
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb") as opened:
            marks.append(f"{file.stat().st_size}:{zlib.crc32(opened.read(2**20)):08x}")
    return " ".join(marks)


def file_name(text: str) -> str:
    """A path or name as one plain file name."""
    return text.strip("./").replace("/", "-")
