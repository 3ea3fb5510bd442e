"""The measure of the graders on small files, its figures counted by hand."""

import re
import subprocess
import sys

from helpers import ROOT, write_jsonl

from tests.grading import measure

PAIRS = [
    {"pred": "1/2", "gold": "0.5", "equal": True},
    {"pred": "3", "gold": "4", "equal": False},
    {"pred": "5", "gold": "5", "equal": False},  # a wrong label: a false positive of every grader
    {"pred": r"so \boxed{7}", "gold": "7", "equal": True, "kind": "boxed_response"},
    {"pred": "no box", "gold": "7", "equal": True, "kind": "boxed_response"},
    {"pred": "it is 7", "gold": "7", "equal": True, "kind": "text_response"},
]


def test_pairs_by_kind(tmp_path, monkeypatch, capsys):
    """The second grader stands for the library, which need not be installed."""
    monkeypatch.setitem(measure.GRADERS, "math_verify", lambda text, gold: "7" in text)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    measure.main([write_jsonl(tmp_path / "pairs.jsonl", PAIRS)])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"exact: \d+\.\d\d ms a pair", lines.pop(1))
    assert re.fullmatch(r"math_verify: \d+\.\d\d ms a pair", lines.pop(6))
    assert lines[1:] == [
        "  answer: 2 of 3 right (66.7%), 1 false positives",
        "  boxed_response: 1 of 2 right (50.0%), 0 false positives",
        "  text_response: 0 of 1 right (0.0%), 0 false positives",
        "  says True: '5' against '5'",
        "  says False: 'no box' against '7'",
        "  answer: 2 of 3 right (66.7%), 0 false positives",
        "  boxed_response: 1 of 2 right (50.0%), 0 false positives",
        "  text_response: 1 of 1 right (100.0%), 0 false positives",
    ]


PROBLEMS = [  # 4, a fraction, none, a list, one that leaves its box open, none, 27
    {"question": "?", "answer": "2 + 2 = 4\n#### 4"},
    {"Solution": r"so \boxed{\frac{1}{2}}"},
    {"answer": None, "solution": "prose"},
    {"answer": "", "solution": r"\boxed{3, 4}"},
    {"answer": "1{"},
    {"problem": "?"},
    {"Answer": 27.0, "solution": ["unread"]},
]


def test_golds_of_problems_as_a_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.grading.measure",
        write_jsonl(tmp_path / "p.jsonl", PROBLEMS),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    file, counts, left_out = done.stdout.splitlines()
    assert file == command[-1] and left_out == "  2 rows without a gold answer are left out"
    assert counts.startswith(
        "5 golds, 5 equal to themselves, 4 right in a box; 0 of 8 changed ones accepted; "
    )
