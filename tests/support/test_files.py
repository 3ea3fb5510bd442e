"""Files that are replaced at once, JSON lines that a kill cut off, and locks."""

import os
import socket

import pytest

from support.config import UserError
from support.files import (
    append_row,
    file_name,
    fingerprint,
    lock,
    read_jsonl,
    replace_folder,
    replace_text,
)


def test_a_failure_leaves_the_old_content(tmp_path):
    replace_text(tmp_path / "new" / "file", "old")
    replace_text(tmp_path / "new" / "file", "new")
    assert (tmp_path / "new" / "file").read_text() == "new"
    for content in ("old", "new"):
        with replace_folder(tmp_path / "folder") as unfinished:
            (unfinished / content).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "folder") as unfinished:
        (unfinished / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with replace_folder(tmp_path / "folder") as unfinished:
        assert not list(unfinished.iterdir())


def test_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_jsonl(file) == []
    rows = [{"text": "é\n\u2028"}, {"number": 0.1}]
    for row in rows:
        append_row(file, row)
    assert read_jsonl(file) == rows
    with file.open("a") as cut:
        cut.write('{"number": 0.')
    assert read_jsonl(file) == rows


@pytest.mark.parametrize("line", ["garbage", "{", "\x00\x00", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 is not JSON: .*delete that line"):
        read_jsonl(file)


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    """flock tells two openings of one process apart, as it does two processes."""
    file = tmp_path / "run" / "lock"
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with lock(file):
        with pytest.raises(UserError, match=f"{file.parent} is in use by {holder}"), lock(file):
            pass
    file.write_text("process 1 on a machine with a long name")  # left by one that was killed
    with lock(file):
        assert file.read_text() == holder


def test_names_and_fingerprints():
    assert file_name("./data/a.jsonl") == "data-a.jsonl"
    assert file_name("owner/name@test") == "owner-name@test"
    assert fingerprint([1, "a"]) == fingerprint([1, "a"]) != fingerprint([1, "b"])
    assert len(fingerprint({})) == 8
