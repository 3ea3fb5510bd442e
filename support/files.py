"""Files, written so that a kill leaves the old content or the new."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def file_name(text: str) -> str:
    """A path or name as one plain file name."""
    return text.strip("./").replace("/", "-")
