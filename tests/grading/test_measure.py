"""The measure of the graders on small files, its figures counted by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grading import measure
from support.config import UserError

PAIRS = [
    {"pred": "1/2", "gold": "0.5", "equal": True},
    {"pred": "3", "gold": "4", "equal": False},
    {"pred": "5", "gold": "5", "equal": False},  # a wrong label: a false positive of every grader
    {"pred": r"so \boxed{7}", "gold": "7", "equal": True, "kind": "boxed_response"},
    {"pred": "no box", "gold": "7", "equal": True, "kind": "boxed_response"},
    {"pred": "it is 7", "gold": "7", "equal": True, "kind": "text_response"},
]


@pytest.fixture
def file(tmp_path):
    def write(*rows) -> str:
        """One line for each row, text as it stands."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "rows.jsonl")

    return write


def test_pairs_by_kind(file, monkeypatch, capsys):
    """The second grader stands for the library, which need not be installed; it differs from exact in two rows."""
    monkeypatch.setitem(measure.GRADERS, "math_verify", lambda answer, gold: answer in ("3", "5", "7"))
    monkeypatch.setitem(measure.GRADERS, "math_verify_text", lambda text, gold: "7" in text)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    measure.main([file(*PAIRS)])
    head, _, *table, times, wrong, missed = capsys.readouterr().out.splitlines()
    assert head == "| kind | pairs | grader | right |  | false positives |"
    assert [line.strip("| ").split(" | ") for line in table] == [
        ["answer", "3", "exact", "2", "66.7%", "1"],
        ["answer", "3", "math_verify", "0", "0.0%", "2"],
        ["answer", "3", "math_verify_text", "2", "66.7%", "0"],
        ["boxed_response", "2", "exact", "1", "50.0%", "0"],
        ["boxed_response", "2", "math_verify", "1", "50.0%", "0"],
        ["boxed_response", "2", "math_verify_text", "1", "50.0%", "0"],
        ["text_response", "1", "exact", "0", "0.0%", "0"],
        ["text_response", "1", "math_verify", "0", "0.0%", "0"],
        ["text_response", "1", "math_verify_text", "1", "100.0%", "0"],
    ]
    assert re.fullmatch("; ".join(rf"{name}: \d+\.\d\d ms a pair" for name in measure.GRADERS), times)
    assert (wrong, missed) == ("exact says True: '5' against '5'", "exact says False: 'no box' against '7'")


def test_without_the_library_exact_is_measured_alone(file, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    measure.main([file(*PAIRS[:2])])
    assert "math_verify" not in capsys.readouterr().out


def test_golds_of_problems(file, capsys):
    r"""Their golds: 4, \frac{1}{2}, 3, 4 as a list, 1{ (which leaves its box open), and 27."""
    path = file({"question": "?", "answer": "2 + 2 = 4\n#### 4"}, "", {"Solution": r"so \boxed{\frac{1}{2}}"},
                {"answer": None, "solution": "prose"}, {"answer": "", "solution": r"\boxed{3, 4}"}, {"answer": "1{"},
                {"problem": "?"}, {"Answer": 27.0, "solution": ["unread"]})
    measure.main([path])
    first, *accepted, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: 5 golds, 5 equal to themselves, 4 correct in a box; 0 of 8 perturbed ones "
                            "accepted; ")
    assert not accepted and last == "  2 rows without a gold answer are left out"


def test_accepted_perturbations_are_shown(file, monkeypatch, capsys):
    monkeypatch.setattr(measure, "is_equal", lambda answer, gold: True)
    measure.main([file({"answer": r"\frac{1}{2}"})])
    assert capsys.readouterr().out.splitlines()[1:] == [
        rf"  accepted: '\\frac{{{other}}}' against '\\frac{{1}}{{2}}'" for other in ("2}{2", "1}{3", "2}{1")]


@pytest.mark.parametrize("row, words", [
    ("{", "line 2 is not JSON"), ("[" * 100_000, "line 2 is not JSON"), ("[1]", "line 2 is no JSON object"),
    ({"answer": [1]}, 'line 2: "answer" must be text or a number, not [1]'),
    ({"solution": True}, 'line 2: "solution" must be text or a number, not true'),
])
def test_bad_problems_are_named(file, row, words):
    with pytest.raises(UserError, match=re.escape(words)):
        measure.main([file({"answer": "1"}, row)])


@pytest.mark.parametrize("row, words", [
    (PAIRS[0] | {"pred": 5}, '"pred" must be text'), (PAIRS[0] | {"gold": None}, '"gold" must be text'),
    (PAIRS[0] | {"kind": 1}, '"kind" must be text'), (PAIRS[0] | {"equal": 1}, '"equal" must be true or false'),
    ({"pred": "5", "gold": "5"}, '"equal" must be true or false'), ({"answer": "5"}, '"pred" must be text'),
])
def test_bad_pairs_are_named(file, row, words):
    with pytest.raises(UserError, match=re.escape(f"line 2: {words}")):
        measure.main([file(PAIRS[0], row)])


def test_as_a_command_a_mistake_is_one_line(file):
    command = [sys.executable, "-m", "grading.measure", file("{}", "{")]
    done = subprocess.run(command, cwd=Path(measure.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {command[-1]}, line 2 is not JSON: give one JSON object a line\n"


def test_files_that_hold_nothing(file):
    for rows in ((), ({"problem": "?"},), ({"numbers": [1, 2], "target": 3},)):
        with pytest.raises(UserError, match="neither pairs nor a gold answer"):
            measure.main([file(*rows)])
    with pytest.raises(UserError, match="give JSONL files"):
        measure.main([])
