"""The rows of a data file, JSONL, JSON or Parquet, or of a data set on the hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub  # transformers brings it along

from support.checks import UserError, hub_dataset, is_remote


def read_rows(source: str) -> Iterator[tuple[str, object]]:
    """(place, row) of each row, the place as errors name it.

    source: a file that ends in .jsonl, .json (a list, or an object that holds one list) or .parquet, any other name
    being taken for JSONL; local, https://, or hf://datasets/owner/name/file; or a data set on the hub as
    owner/name@split or owner/name:config@split. Raises UserError for what cannot be read.
    """
    if not is_remote(source) and not Path(source).is_file():
        if not hub_dataset(source):
            raise UserError(f"{source}: no such file; give one, or a data set of the hub as owner/name@split or "
                            "owner/name:config@split")
        return numbered("row", hub_rows(source))
    if source.endswith(".parquet"):
        return numbered("row", parquet_rows(source))
    text = read_bytes(source)
    try:
        text = text.decode("utf-8-sig")  # -sig: some editors put a mark in front
    except UnicodeDecodeError as error:
        raise cannot(source, error) from None
    return numbered("row", json_rows(source, text)) if source.endswith(".json") else jsonl_rows(source, text)


def numbered(word: str, rows: list) -> Iterator[tuple[str, object]]:
    return ((f"{word} {number}", row) for number, row in enumerate(rows, start=1))


def jsonl_rows(source: str, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=once)
            except (ValueError, RecursionError):
                raise UserError(f"{source}, line {number} is not JSON: give one JSON object a line") from None
            yield f"line {number}", row


def once(pairs: list[tuple]) -> dict:
    """A JSON object; one that has a key twice is none."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return row


def json_rows(source: str, text: str) -> list:
    try:
        tree = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise cannot(source, error) from None
    lists = [tree] if isinstance(tree, list) else [x for x in tree.values() if isinstance(x, list)] \
        if isinstance(tree, dict) else []
    if len(lists) != 1:
        raise UserError(f"{source} holds {len(lists)} lists of rows: give a list of objects, or an object with one")
    return lists[0]


def parquet_rows(source: str) -> list[dict]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise needs("pyarrow", source) from None
    try:
        return parquet.read_table(BufferReader(read_bytes(source))).to_pylist()
    except ArrowException as error:
        raise cannot(source, error) from None


def hub_rows(source: str) -> list[dict]:
    name, config, split = hub_dataset(source)
    try:
        import datasets
    except ImportError:
        raise needs("datasets", source) from None
    if not Path(name).is_dir() and not hub_in_reach():
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # its cache on disk, at once
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except Exception as error:  # whatever the library, the hub's client and the network raise
        raise cannot(source, error) from None


def hub_in_reach() -> bool:
    try:
        urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=10)
    except HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def needs(library: str, source: str) -> UserError:
    return UserError(f"{source}: pip install {library}, or give a JSONL file; that library is not here")


def read_bytes(path: str) -> bytes:
    """The content of a local file, or of one on the hub (hf://datasets/owner/name/file) or the web (https://...)."""
    try:
        if path.startswith("hf://"):
            return huggingface_hub.HfFileSystem().read_bytes(path)
        if is_remote(path):
            with urlopen(path, timeout=30) as answer:
                return answer.read()
        return Path(path).read_bytes()
    except Exception as error:  # whatever the hub's client, the network and the disk raise
        raise cannot(path, error) from None


def cannot(source: str, error: Exception) -> UserError:
    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    mend = "give a JSONL, JSON or Parquet file, the text in UTF-8"
    if is_remote(source) or hub_dataset(source):
        mend = "check the name and the network, or download it and give a local path"
    return UserError(f"cannot read {source} ({reason}): {mend}")
