"""The library Math-Verify in its child process, for real."""

import time
from pathlib import Path

import pytest

from grading import GRADERS, GraderError, math_verify
from grading.math_verify import grade


@pytest.fixture(scope="module", autouse=True)
def no_child_afterwards():
    yield
    math_verify.stop()


@pytest.fixture
def no_child():
    math_verify.stop()


def boxed(answer: str) -> str:
    return rf"so it is $\boxed{{{answer}}}$."


def test_agrees_where_it_should_and_cannot_hang(monkeypatch):
    for one, other in (("1/2", "0.5"), (r"\sqrt{12}", r"2\sqrt{3}"), ("x+1", "1+x"), ("7", "7")):
        assert GRADERS["math_verify"](boxed(one), other)
    assert not grade(boxed("3"), "4") and not grade(boxed(""), "4") and not grade(boxed(""), "")
    child = math_verify._child
    monkeypatch.setattr(math_verify, "LIMIT", 0.5)
    started = time.monotonic()
    assert not grade(boxed("9^{9^{9^{9^{9}}}}"), "5")
    assert time.monotonic() - started < 20 and child.poll() is not None  # killed
    monkeypatch.setattr(math_verify, "LIMIT", 20.0)
    assert grade(boxed("0.25"), "1/4") and math_verify._child is not child  # another one started
    math_verify._child.kill()
    math_verify._child.wait()
    assert grade(boxed("0.25"), "1/4")  # also after the child died by itself


def test_the_answer_may_stand_outside_a_box():
    assert grade("so it is 1/2", "0.5") and not grade("so it is 1/3", "0.5")
    assert not grade("", "0.5")
    assert grade("so it is $3x$, thus 7", "7")


def test_long_texts_end_in_time(monkeypatch):
    assert grade(boxed("0.5"), "1/2")  # the start of the child is not timed
    monkeypatch.setattr(math_verify, "LIMIT", 0.5)
    for text in ("(" * 100_000, boxed("1+" * 10**6 + "1")):
        started = time.monotonic()
        assert not grade(text, "5")
        assert time.monotonic() - started < 20


def test_only_the_end_of_a_long_text_counts():
    assert grade("so " * 100_000 + boxed("1/2"), "0.5")
    assert not grade(boxed("1/2") + " so" * 100_000, "0.5")


def test_the_gold_answer_comes_first():
    """The library takes an interval for a gold inequality, but not the other way round."""
    assert grade(boxed(r"(3,\infty)"), "x>3") and not grade(boxed("x>3"), r"(3,\infty)")


def test_the_child_imports_the_library_and_not_itself(no_child, monkeypatch):
    """Its file bears the library's name, and here its folder is the working folder too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # which may hold "."
    monkeypatch.chdir(Path(math_verify.__file__).parent)
    assert Path(math_verify.__file__).name == "math_verify.py" and grade(boxed("0.5"), "1/2")


def test_a_library_that_does_not_start_is_an_error_each_time(no_child, monkeypatch):
    monkeypatch.setattr(math_verify.sys, "executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(GraderError, match="does not start"):
            grade(boxed("1"), "1")
