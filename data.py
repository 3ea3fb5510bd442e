"""Problems: the Countdown generator, problems from a JSONL file, and their prompts and grades.

A problem is a dict as it stands in a JSONL row. Countdown: {"numbers": [3, 5, 7, 2], "target": 24},
"use each number once to reach the target", answered by a chain of steps: `3*5=15, 15+7=22, 22+2=24`.
"""

import json
import random
import zlib
from pathlib import Path

from config import UserError
from rewards import solves_countdown


def is_heldout(numbers: list[int], target: int) -> bool:
    """True for the tenth of all Countdown problems that is kept for evaluation.

    A pure function of the problem, whatever the order of its numbers: nothing that draws with
    `heldout=False` (warm start, training) can ever meet a held-out problem.
    """
    key = f"{sorted(numbers)} -> {target}"
    return zlib.crc32(key.encode()) % 10 == 0


def random_chain(rng: random.Random, *, numbers: int, largest: int, limit: int) -> tuple[dict, str]:
    """A Countdown problem made backwards: random steps on random numbers, the target is what they reach.

    `numbers` operands from 1 to `largest`; every value stays a whole number from 0 to `limit`.
    Returns the problem and the chain that solves it.
    """
    given = [rng.randint(1, largest) for _ in range(numbers)]
    left, steps = list(given), []
    while len(left) > 1:
        a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
        results = {"+": a + b, "*": a * b, "-": a - b}
        if b and a % b == 0:
            results["/"] = a // b
        results = {op: value for op, value in results.items() if 0 <= value <= limit}
        if not results:  # only when a < b and a + b > limit: the other way round b - a is always allowed
            a, b, results = b, a, {"-": b - a}
        op = rng.choice(sorted(results))
        left.append(results[op])
        steps.append(f"{a}{op}{b}={results[op]}")
    return {"numbers": given, "target": left[0]}, ", ".join(steps)


def countdown(count: int, *, heldout: bool, numbers: int, largest: int, limit: int) -> list[dict]:
    """`count` different Countdown problems from one side of the held-out split, always the same ones."""
    rng = random.Random(f"countdown {heldout}")
    problems: dict[str, dict] = {}
    for _ in range(100 * count):
        problem, _ = random_chain(rng, numbers=numbers, largest=largest, limit=limit)
        if is_heldout(**problem) == heldout:
            problems.setdefault(f"{sorted(problem['numbers'])} {problem['target']}", problem)
        if len(problems) == count:
            return list(problems.values())
    raise UserError(f"countdown: fewer than {count} different problems exist at numbers={numbers}, "
                    f"largest={largest}, limit={limit}: ask for fewer, or enlarge one of these")


def read_jsonl(path: str) -> list[dict]:
    """Countdown problems from a JSONL file, one `{"numbers": [..], "target": n}` a line; errors name file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: cannot read {path} ({error}): give `countdown` or a JSONL file") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"data: {path}, line {number} is not JSON: mend or remove that line") from None
        numbers, target = (row.get("numbers"), row.get("target")) if isinstance(row, dict) else (None, None)
        # type(), for True is an int to isinstance
        if not (isinstance(numbers, list) and numbers and {type(x) for x in [*numbers, target]} == {int}):
            raise UserError(f'data: {path}, line {number} is no problem: it needs "numbers": [whole numbers] '
                            'and "target": a whole number')
        problems.append({"numbers": numbers, "target": target})
    if not problems:
        raise UserError(f"data: {path} holds no problem: give a file with at least one row")
    return problems


def render(problem: dict, template: str) -> str:
    """The prompt text of a problem; `template` names its fields in braces."""
    return template.format(numbers=" ".join(map(str, problem["numbers"])), target=problem["target"])


def answer_of(text: str) -> str:
    """What two completions must share to be one answer: the chain, whatever its spaces."""
    return "".join(text.split())


def is_correct(problem: dict, text: str) -> bool:
    """The verifiable reward's verdict on a completion."""
    return solves_countdown(text, problem["numbers"], problem["target"])


def training_problems(config) -> tuple[list[dict], int]:
    """The problems of `data`: generated ones from the training side of the held-out split, or a file's.

    Where the evaluation's problems are generated, a file's rows on their side of the split are left out;
    their number comes second.
    """
    if config.data == "countdown":
        return countdown(config.countdown_problems, heldout=False, **vars(config.countdown)), 0
    problems = read_jsonl(config.data)
    kept = [p for p in problems if config.evaluation.data != "auto" or not is_heldout(**p)]
    return kept, len(problems) - len(kept)


def heldout_problems(file: str, count: int, countdown_settings: dict) -> list[dict]:
    """The first `count` problems of a file; auto: generated ones from the held-out side of the split."""
    if file != "auto":
        return read_jsonl(file)[:count]
    return countdown(count, heldout=True, **countdown_settings)
