"""Where texts and problem files hold their final answers."""

import pytest

from grading import extract_answer, gold_answer


def test_extract_answer():
    cases = {
        r"\boxed{1} and \boxed{2}": "2",
        r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
        r"\boxed {7}": "7",
        "no answer": None,
        r"\boxed{3": None,
        r"\boxed{1} then \boxed{2": "1",
        r"\boxed{\boxed{5}}": "5",
        r"} \boxed{a}": "a",
        r"{ \boxed{5}": "5",
        r"\boxed{}": "",
        r"\boxed{\{1,2\}}": r"\{1,2\}",
        r"\boxed{\left\{1\right.}": r"\left\{1\right.",
        r"\\boxed{3}": None,
        r"\boxed{1}}": "1",
        "\\boxed{a\nb}": "a\nb",
    }
    for text, answer in cases.items():
        assert extract_answer(text) == answer, text


def test_gold_answer():
    cases = [
        ("6 * 7 = 42\n#### 1,042 ", "answer", "1,042"),
        ("#### 1\n#### 2\n", "answer", "2"),
        ("Add #### 2", "solution", "2"),
        ("#### Sum\nso \\boxed{9}.\n#### 8", "solution", "9"),
        ("#### Sum\n3 + 4\n\n#### Result\nThe answer is $\\boxed{7}$.", "solution", "7"),
        ("#### Sum\nThe answer is 7.", "solution", ""),
        ("#### Sum\n7", "answer", "#### Sum\n7"),
        (" 7 ", "answer", "7"),
        (r"so \boxed{x} is \boxed{\frac12}.", "solution", r"\frac12"),
        (r"\boxed{ 3 }", "answer", "3"),
        ("so it is 3.", "solution", ""),
        (r"\boxed{3", "answer", ""),
        ("", "answer", ""),
        (None, "answer", ""),
        (27, "answer", "27"),
        (27.0, "answer", "27"),
        (-0.5, "solution", "-0.5"),
        (2.5e-05, "answer", "0.000025"),
        (-1e-07, "answer", "-0.0000001"),
        (0.1 + 0.2, "answer", "0.30000000000000004"),
        (1e23, "answer", "100000000000000000000000"),
        (10**40 + 1, "answer", "1" + "0" * 39 + "1"),
    ]
    for value, name, answer in cases:
        assert gold_answer(value, name) == answer, (value, name)
    for value in (True, [3], {"value": 3}, float("nan"), float("inf")):
        with pytest.raises(ValueError, match='"answer" must be text or a number'):
            gold_answer(value, "answer")
