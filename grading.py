r"""How good the graders of mathematics are, on files.

    python grading.py vectors.jsonl          # rows {"pred", "gold", "equal"}: verdicts against truth, grader by grader
    python grading.py math/train.jsonl       # problems: each gold against itself, in a \boxed{}, and perturbed

Where a row's "kind" is boxed_response or text_response, pred is a whole text with the answer in its last \boxed{}.
"""

import importlib.util
import json
import re
import sys
import time
from collections import Counter

from tqdm import tqdm

import config as configs
import data
from evaluate import aligned
from rewards import GRADERS, extract_answer, is_equal


def verdict(grader: str, row: dict) -> bool:
    answer = row["pred"] if row.get("kind", "answer") == "answer" else extract_answer(row["pred"])
    return answer is not None and GRADERS[grader](answer, row["gold"])


def compare(rows: list[dict]) -> None:
    """A table of right verdicts, of false positives and of time, by kind; then exact's failures."""
    graders = [name for name in GRADERS if name != "math_verify" or importlib.util.find_spec("math_verify")]
    verdicts, seconds = {}, {}
    for grader in graders:
        started = time.perf_counter()
        verdicts[grader] = [verdict(grader, row) for row in tqdm(rows, desc=grader, unit="pair", leave=False)]
        seconds[grader] = time.perf_counter() - started
    kinds = list(dict.fromkeys(row.get("kind", "answer") for row in rows))
    columns = [f"{grader} {what}" for grader in graders for what in ("right", "false positives")]
    table = [["kind", "pairs", *columns, "they agree"]]
    for kind in kinds:
        chosen = [i for i, row in enumerate(rows) if row.get("kind", "answer") == kind]
        line = [kind, str(len(chosen))]
        for grader in graders:
            right = sum(verdicts[grader][i] == rows[i]["equal"] for i in chosen)
            false = sum(verdicts[grader][i] and not rows[i]["equal"] for i in chosen)
            line += [f"{right} ({right / len(chosen):.1%})", str(false)]
        agree = sum(len({verdicts[grader][i] for grader in graders}) == 1 for i in chosen)
        table.append([*line, f"{agree} ({agree / len(chosen):.1%})"])
    print(aligned(table))
    print("; ".join(f"{grader}: {seconds[grader] / len(rows) * 1000:.2f} ms a pair" for grader in graders))
    for row, found in zip(rows, verdicts["exact"]):
        if found != row["equal"] and row.get("kind") != "text_response":
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
    for gold in tqdm(golds, desc=file, unit="gold", leave=False):
        count["equal to itself"] += is_equal(gold, gold)
        count["boxed"] += data.is_correct({"answer": gold}, rf"so it is \boxed{{{gold}}}.", "exact")
        others = perturbed(gold)
        count["perturbed"] += len(others)
        accepted += [(other, gold) for other in others if is_equal(other, gold)]
    print(f"{file}: {len(golds)} golds, {count['equal to itself']} equal to themselves, {count['boxed']} correct in a "
          f"box; {len(accepted)} of {count['perturbed']} perturbed ones accepted; "
          f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    for other, gold in accepted[:5]:
        print(f"  accepted: {other!r} against {gold!r}")


def main(files: list[str]) -> None:
    configs.require(bool(files), "give JSONL files, as in `python grading.py vectors.jsonl math/train.jsonl`")
    for file in files:
        lines = data.read_text(file).split("\n")
        first = json.loads(lines[0]) if lines and lines[0].startswith("{") else {}
        if {"pred", "gold", "equal"} <= first.keys():
            compare([json.loads(line) for line in lines if line.strip()])
        else:
            sweep(file, [problem["answer"] for problem in data.read_jsonl(file)[0]])


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1:])
