"""One process at a time."""

import os
import socket
import threading

import pytest

from support import processes
from support.config import UserError


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    """flock knows two openings of one process apart, as it does two processes."""
    file = tmp_path / "run" / "lock"
    with processes.only_one(file):
        with pytest.raises(UserError) as told, processes.only_one(file):
            pass
        for word in (str(file.parent), f"process {os.getpid()} on {socket.gethostname()}", "end it"):
            assert word in str(told.value)
        with processes.only_one(file, rank=1):  # that of rank 0 stands for all
            pass
    assert not file.parent.exists()
    file.parent.mkdir()
    file.write_text("process 1 on elsewhere")  # left by one that was killed: nobody holds it
    with processes.only_one(file):
        assert file.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        (file.parent / "work").touch()
    assert [path.name for path in file.parent.iterdir()] == ["work"]


def test_whoever_opened_a_lock_that_was_removed_since_does_not_hold_it(tmp_path, monkeypatch):
    file, flock, opened = tmp_path / "lock", processes.fcntl.flock, []

    def slowly(lock, how):
        if not opened:
            opened.append(lock)
            file.unlink()  # the holder ends between our opening and our locking
        return flock(lock, how)

    monkeypatch.setattr(processes.fcntl, "flock", slowly)
    with processes.only_one(file), pytest.raises(UserError, match="in use"), processes.only_one(file):
        pass


def test_a_machine_without_git(monkeypatch):
    known = processes.versions()
    monkeypatch.setenv("PATH", "")
    assert processes.versions() == known | {"commit": ""}


@pytest.mark.parametrize("name, reason", [("n" * 300, "File name too long"), ("file", "File exists")])
def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to .*{reason}$"), processes.only_one(tmp_path / name / "lock"):
        pass


def test_who_may_wait_goes_on_when_the_other_ends(tmp_path, capfd):
    file, order, held = tmp_path / "lock", [], threading.Event()

    def first():
        with processes.only_one(file):
            held.set()
            while "waiting for process" not in "".join(told):
                told.append(capfd.readouterr().err)
            order.append("first")

    told = []
    other = threading.Thread(target=first)
    other.start()
    held.wait()
    with processes.only_one(file, wait=True):
        order.append("second")
    other.join()
    assert order == ["first", "second"] and not file.exists()
