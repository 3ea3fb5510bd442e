"""An evaluation's completions as a file, evaluations/<model>--<data>-<settings>/completions.jsonl."""

import json
from pathlib import Path


def lines_of(evaluation, texts: list[str]) -> str:
    """One JSON object a completion."""
    columns = evaluation.correct.ravel(), evaluation.lengths.ravel(), evaluation.stopped.ravel()
    samples = evaluation.correct.shape[1]
    return "".join(json.dumps({"problem": i // samples, "sample": i % samples, "text": text, "correct": bool(correct),
                               "length": int(length), "stopped": bool(stopped)}) + "\n"
                   for i, (text, correct, length, stopped) in enumerate(zip(texts, *columns)))


def show(name: str, file: Path, problems: list[dict], count: int) -> None:
    """The problems that most samples solve, and those that fewest do, with a right and a wrong completion."""
    completions: list[list[dict]] = [[] for _ in problems]
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        completions[row["problem"]].append(row)
    solved = [sum(row["correct"] for row in rows) for rows in completions]
    order = sorted(range(len(problems)), key=lambda problem: -solved[problem])
    for problem in dict.fromkeys(order[:count] + order[len(order) - count :]):
        rows = completions[problem]
        print(f"\n{name}, problem {problem}: {solved[problem]} of {len(rows)} right\n  "
              + json.dumps(problems[problem], ensure_ascii=False))
        for word, verdict in (("right", True), ("wrong", False)):
            example = next((row["text"] for row in rows if row["correct"] == verdict), None)
            if example is not None:
                print(f"  {word}: {example.strip()}")
