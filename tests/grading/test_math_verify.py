"""The library Math-Verify in its child process, for real."""

import time
from pathlib import Path

import pytest

from grading import GRADERS, math_verify
from grading.math_verify import is_equal


@pytest.fixture(autouse=True)
def a_child_of_its_own():
    math_verify.stop()
    yield
    math_verify.stop()


def test_agrees_where_it_should_and_cannot_hang(monkeypatch):
    for one, other in (("1/2", "0.5"), (r"\sqrt{12}", r"2\sqrt{3}"), ("x+1", "1+x"), ("7", "7")):
        assert GRADERS["math_verify"](one, other)
    assert not is_equal("3", "4") and not is_equal("", "4") and not is_equal("", "")
    child = math_verify._child
    monkeypatch.setattr(math_verify, "LIMIT", 0.5)
    started = time.monotonic()
    assert not is_equal("9^{9^{9^{9^{9}}}}", "5")
    assert time.monotonic() - started < 20 and child.poll() is not None  # killed
    monkeypatch.setattr(math_verify, "LIMIT", 20.0)
    assert is_equal("0.25", "1/4") and math_verify._child is not child  # and another one started
    math_verify._child.kill()
    math_verify._child.wait()
    assert is_equal("0.25", "1/4")  # also where it died by itself


def test_long_answers_end_in_time(monkeypatch):
    assert is_equal("0.5", "1/2")  # its start is not timed
    monkeypatch.setattr(math_verify, "LIMIT", 0.5)
    started = time.monotonic()
    assert not is_equal("(" * 100_000, "5")
    assert time.monotonic() - started < 20


def test_the_gold_answer_comes_first():
    """The library takes an interval for a gold inequality, but no inequality for a gold interval."""
    assert is_equal(answer=r"(3,\infty)", gold="x>3") and not is_equal(answer="x>3", gold=r"(3,\infty)")


def test_the_child_imports_the_library_and_not_itself(monkeypatch):
    """Its file bears the library's name, and here its folder is the working folder too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # which may hold "."
    monkeypatch.chdir(Path(math_verify.__file__).parent)
    assert Path(math_verify.__file__).name == "math_verify.py" and is_equal("0.5", "1/2")


def test_what_is_too_long_is_wrong_at_once(monkeypatch):
    monkeypatch.setattr(math_verify, "_child", None)
    assert not is_equal("1+" * 10**6 + "1", "7") and math_verify._child is None  # the library has not seen it
