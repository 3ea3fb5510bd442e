"""Mathematics: where a text holds its final answer, and whether two answers are the same."""

from grading import math_verify
from grading.answers import extract_answer, gold_answer
from grading.matching import answer_key, is_equal

__all__ = ["GRADERS", "READ_TEXT", "answer_key", "extract_answer", "gold_answer", "is_equal"]

GRADERS = {"exact": is_equal, "math_verify": math_verify.is_equal, "math_verify_text": math_verify.text_is_equal}
READ_TEXT = {"math_verify_text"}  # (completion, gold) -> bool; the others (answer, gold) -> bool
