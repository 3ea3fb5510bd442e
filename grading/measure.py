r"""How good the graders of mathematics are, on files.

    python -m grading.measure vectors.jsonl      # rows {"pred", "gold", "equal"}: verdicts against truth, by grader
    python -m grading.measure math/train.jsonl   # problems: each gold against itself, in a \boxed{}, and perturbed

Where a row's "kind" is boxed_response or text_response, pred is a whole text with the answer in its last \boxed{}.
"""

import importlib.util
import re
import sys
import time
from collections import Counter

from tqdm import tqdm

from grading import GRADERS, READ_TEXT, extract_answer, gold_answer, is_equal
from support.config import UserError, one_line_errors, require
from support.rows import read_rows
from support.tables import markdown_table

PAIR = {"pred": str, "gold": str, "equal": bool, "kind": str}


def verdict(grader: str, row: dict) -> bool:
    if grader in READ_TEXT and row["kind"] == "answer":
        return GRADERS[grader](rf"\boxed{{{row['pred']}}}", row["gold"])
    answer = row["pred"] if row["kind"] == "answer" or grader in READ_TEXT else extract_answer(row["pred"])
    return answer is not None and GRADERS[grader](answer, row["gold"])


def compare(rows: list[dict]) -> None:
    """A table of right verdicts, of false positives and of time, by kind; then exact's failures."""
    graders = [name for name in GRADERS if name == "exact" or importlib.util.find_spec("math_verify")]
    verdicts, seconds = {}, {}
    for grader in graders:
        started = time.perf_counter()
        bar = tqdm(rows, desc=grader, unit="pair", leave=False, disable=None)
        verdicts[grader] = [verdict(grader, row) for row in bar]
        seconds[grader] = time.perf_counter() - started
    table = [["kind", "pairs", "grader", "right", "", "false positives"]]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [i for i, row in enumerate(rows) if row["kind"] == kind]
        for grader in graders:
            right = sum(verdicts[grader][i] == rows[i]["equal"] for i in chosen)
            false = sum(verdicts[grader][i] and not rows[i]["equal"] for i in chosen)
            table.append([kind, str(len(chosen)), grader, str(right), f"{right / len(chosen):.1%}", str(false)])
    print(markdown_table(table[0], table[1:]), end="")
    print("; ".join(f"{grader}: {seconds[grader] / len(rows) * 1000:.2f} ms a pair" for grader in graders))
    for row, found in zip(rows, verdicts["exact"]):
        if found != row["equal"] and row["kind"] != "text_response":
            print(f"exact says {found}: {row['pred'][-60:]!r} against {row['gold']!r}")


def perturbed(gold: str) -> list[str]:
    """Other answers: each of the first three numbers one higher, and the fractions upside down."""
    numbers = list(re.finditer(r"\d+", gold))[:3]
    changed = [gold[: n.start()] + str(int(n[0]) + 1) + gold[n.end() :] for n in numbers]
    swapped = re.sub(r"\\([dt]?frac)\{([^{}]*)\}\{([^{}]*)\}", r"\\\1{\3}{\2}", gold)
    return changed + [swapped] * (swapped != gold)


def sweep(file: str, golds: list[str]) -> None:
    """Counts of golds that equal themselves, of boxed ones graded correct, and of perturbed ones graded wrong."""
    count, accepted, started = Counter(), [], time.perf_counter()
    for gold in tqdm(golds, desc=file, unit="gold", leave=False, disable=None):
        count["equal to itself"] += is_equal(gold, gold)
        boxed = extract_answer(rf"so it is \boxed{{{gold}}}.")
        count["boxed"] += boxed is not None and is_equal(boxed, gold)
        others = perturbed(gold)
        count["perturbed"] += len(others)
        accepted += [(other, gold) for other in others if is_equal(other, gold)]
    print(f"{file}: {len(golds)} golds, {count['equal to itself']} equal to themselves, {count['boxed']} correct in a "
          f"box; {len(accepted)} of {count['perturbed']} perturbed ones accepted; "
          f"{time.perf_counter() - started:.1f} s")
    for other, gold in accepted[:5]:
        print(f"  accepted: {other!r} against {gold!r}")


def pairs_or_golds(file: str) -> tuple[bool, list]:
    """Whether the first row of a file is a pair, and all its rows: pairs, or each problem's gold, "" if it has none."""
    are_pairs, rows = False, []
    for place, row in read_rows(file):
        require(isinstance(row, dict), f"{file}, {place} is no JSON object: give one a line")
        are_pairs = are_pairs if rows else row.keys() >= {"pred", "gold", "equal"}
        try:
            rows.append(checked(row) if are_pairs else gold_of(row))
        except ValueError as error:
            raise UserError(f"{file}, {place}: {error}") from None
    return are_pairs, rows


def checked(row: dict) -> dict:
    """A pair with its kind; ValueError if a field is missing or of another type."""
    row = {"kind": "answer"} | row
    for field, kind in PAIR.items():
        if type(row.get(field)) is not kind:
            raise ValueError(f'"{field}" must be {"text" if kind is str else "true or false"}')
    return row


def gold_of(row: dict) -> str:
    row = {key.lower(): value for key, value in row.items()}
    return gold_answer(row.get("answer"), "answer") or gold_answer(row.get("solution"), "solution")


def main(files: list[str]) -> None:
    require(bool(files), "give JSONL files, as in `python -m grading.measure vectors.jsonl math/train.jsonl`")
    for file in files:
        are_pairs, rows = pairs_or_golds(file)
        if are_pairs:
            compare(rows)
        else:
            golds = [gold for gold in rows if gold]
            require(bool(golds), f"{file} holds neither pairs nor a gold answer: give one in answer or solution")
            sweep(file, golds)
            if len(golds) < len(rows):
                print(f"  {len(rows) - len(golds)} rows without a gold answer are left out")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
