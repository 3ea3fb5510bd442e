"""The rows of a data file: JSONL is read here, everything else by Hugging Face's `datasets`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from support.checks import UserError, hub_dataset

BUILDERS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}  # of `datasets`, for local files


def read_rows(source: str) -> Iterator[tuple[str, object]]:
    """(place, row) of each row, the place as errors name it.

    source: a local .json, .parquet or .csv; any other local file, which is taken for JSONL; or a data set on the hub
    as owner/name@split or owner/name:config@split. Raises UserError for what cannot be read.
    """
    if Path(source).is_file() and Path(source).suffix not in BUILDERS:
        return jsonl_rows(source)
    return ((f"row {number}", row) for number, row in enumerate(library_rows(source), start=1))


def jsonl_rows(source: str) -> Iterator[tuple[str, object]]:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")  # -sig: some editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise cannot(source, error) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{source}, line {number} is not JSON: give one JSON object a line") from None
            yield f"line {number}", row


def library_rows(source: str) -> list[dict]:
    if Path(source).is_file():
        asked = {"path": BUILDERS[Path(source).suffix], "data_files": source, "split": "train"}
    elif found := hub_dataset(source):
        asked = dict(zip(("path", "name", "split"), found))
    else:
        raise UserError(f"{source}: no such file; give one, or a data set of the hub as owner/name@split or "
                        "owner/name:config@split")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: pip install datasets, or give a JSONL file; that library is not here") from None
    try:
        return datasets.load_dataset(**asked).to_list()
    except Exception as error:  # whatever the library, the hub's client and the network raise
        raise cannot(source, error) from None


def cannot(source: str, error: Exception) -> UserError:
    cause = error.__cause__ or error  # `datasets` says "an error occurred" and keeps the error itself behind it
    reason = re.sub(r"\s+", " ", f"{type(cause).__name__}: {cause}")[:200]
    return UserError(f"cannot read {source} ({reason})")
