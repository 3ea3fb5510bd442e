r"""Grades mathematics: finds the final answer in a completion and compares it with the gold answer.

A grader takes (completion, gold answer) and returns whether the completion is right.
"""

from grading import math_verify
from grading.answers import extract_answer, gold_answer
from grading.matching import is_equal
from grading.math_verify import GraderError

__all__ = ["GRADERS", "GraderError", "extract_answer", "gold_answer", "is_equal"]


def grade_exactly(text: str, gold: str) -> bool:
    r"""Return whether the last \boxed{} of a completion holds the gold answer."""
    answer = extract_answer(text)
    return answer is not None and is_equal(answer, gold)


GRADERS = {"exact": grade_exactly, "math_verify": math_verify.grade}
