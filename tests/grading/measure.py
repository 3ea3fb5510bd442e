r"""Measures how good the graders of mathematics are, on JSONL files.

    python -m tests.grading.measure vectors.jsonl      # pairs: {"pred", "gold", "equal"}
    python -m tests.grading.measure math/train.jsonl   # problems: with an answer or a solution

The pred of a pair is an answer; if the pair has a "kind" other than answer it is a completion.
"""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

from grading import GRADERS, gold_answer, is_equal


def measure_pairs(pairs: list[dict]) -> None:
    """Print each grader's right verdicts and false positives by kind, then the errors of exact."""
    for grader, grade in GRADERS.items():
        if grader == "math_verify" and importlib.util.find_spec("math_verify") is None:
            continue
        started = time.perf_counter()
        verdicts = []
        for pair in pairs:
            is_answer = pair.get("kind", "answer") == "answer"
            text = rf"\boxed{{{pair['pred']}}}" if is_answer else pair["pred"]
            verdicts.append(grade(text, pair["gold"]))
        milliseconds = (time.perf_counter() - started) / len(pairs) * 1000
        print(f"{grader}: {milliseconds:.2f} ms a pair")
        for kind in dict.fromkeys(pair.get("kind", "answer") for pair in pairs):
            results = [
                (verdict, pair["equal"])
                for verdict, pair in zip(verdicts, pairs)
                if pair.get("kind", "answer") == kind
            ]
            right = sum(verdict == equal for verdict, equal in results)
            false = sum(verdict and not equal for verdict, equal in results)
            share = f"{right / len(results):.1%}"
            print(f"  {kind}: {right} of {len(results)} right ({share}), {false} false positives")
        for verdict, pair in zip(verdicts, pairs):
            is_wrong = verdict != pair["equal"] and pair.get("kind") != "text_response"
            if grader == "exact" and is_wrong:
                print(f"  says {verdict}: {pair['pred'][-60:]!r} against {pair['gold']!r}")


def changed(gold: str) -> list[str]:
    """Return other answers: each of the first three numbers one higher, fractions upside down."""
    answers = []
    for number in list(re.finditer(r"\d+", gold))[:3]:
        answers.append(gold[: number.start()] + str(int(number[0]) + 1) + gold[number.end() :])
    swapped = re.sub(r"\\([dt]?frac)\{([^{}]*)\}\{([^{}]*)\}", r"\\\1{\3}{\2}", gold)
    return answers if swapped == gold else [*answers, swapped]


def measure_golds(golds: list[str]) -> None:
    """Print how many golds equal themselves, are right in a box, and equal a changed answer."""
    started = time.perf_counter()
    themselves = sum(is_equal(gold, gold) for gold in golds)
    boxed = sum(GRADERS["exact"](rf"so it is \boxed{{{gold}}}.", gold) for gold in golds)
    others = [(other, gold) for gold in golds for other in changed(gold)]
    accepted = [(other, gold) for other, gold in others if is_equal(other, gold)]
    print(
        f"{len(golds)} golds, {themselves} equal to themselves, {boxed} right in a box; "
        f"{len(accepted)} of {len(others)} changed ones accepted; "
        f"{time.perf_counter() - started:.1f} s"
    )
    for other, gold in accepted[:5]:
        print(f"  accepted: {other!r} against {gold!r}")


def gold_of(row: dict) -> str:
    """Return a problem's gold answer, "" if it has none."""
    row = {field.lower(): value for field, value in row.items()}
    gold = gold_answer(row.get("answer"), "answer")
    return gold or gold_answer(row.get("solution"), "solution")


def main(files: list[str]) -> None:
    for file in files:
        print(file)
        lines = Path(file).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        if rows[0].keys() >= {"pred", "gold", "equal"}:
            measure_pairs(rows)
        else:
            golds = [gold for gold in map(gold_of, rows) if gold]
            measure_golds(golds)
            if len(golds) < len(rows):
                print(f"  {len(rows) - len(golds)} rows without a gold answer are left out")


if __name__ == "__main__":
    main(sys.argv[1:])
