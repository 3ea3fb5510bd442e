"""Provides problems: the Countdown generator, files, data sets, prompts and held-out problems.

A problem is a dict. Countdown: {"numbers": [3, 5, 7, 2], "target": 24}, "use each number once to
reach the target", answered by a chain of steps: `3*5=15, 15+7=22, 22+2=24`. Mathematics:
{"problem": text, "answer": final answer}, answered by a text with the answer in \\boxed{}.
"""

import json
import math
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from grading import gold_answer
from support import models
from support.config import UserError, require, split_list
from support.distributed import note

# Names for `data` and `evaluation.data`, and where the problems are on the hub.
BENCHMARKS = {
    "gsm8k": "openai/gsm8k:main@test",  # 1,319 problems
    "math500": "HuggingFaceH4/MATH-500@test",  # 500
    "amc": "AI-MO/aimo-validation-amc@train",  # 83, of 2022 and 2023
    "aime24": "HuggingFaceH4/aime_2024@train",  # 30
    "aime25": "math-ai/aime25@test",  # 30
}

# ---------------------------------------------------------------- Countdown


def is_heldout(numbers: list[int], target: int) -> bool:
    """Return whether a Countdown problem is in the tenth that is kept for evaluation.

    This depends on nothing but the problem, whatever the order of its numbers. So a model whose
    training data leave these problems out has never seen one in evaluation.
    """
    key = f"{sorted(numbers)} -> {target}"
    return zlib.crc32(key.encode()) % 10 == 0


def random_chain(rng: random.Random, *, numbers: int, largest: int, limit: int) -> tuple[dict, str]:
    """Make a Countdown problem backwards: the target is what random steps reach.

    The steps are random operations on random numbers: `numbers` operands from 1 to `largest`; every
    intermediate result is a whole number from 0 to `limit`. Returns the problem and the chain that
    solves it.
    """
    given = [rng.randint(1, largest) for _ in range(numbers)]
    left = list(given)
    steps = []
    while len(left) > 1:
        a = left.pop(rng.randrange(len(left)))
        b = left.pop(rng.randrange(len(left)))
        results = {"+": a + b, "*": a * b, "-": a - b}
        if b and a % b == 0:
            results["/"] = a // b
        results = {op: value for op, value in results.items() if 0 <= value <= limit}
        if not results:  # happens only if a < b and a + b > limit; b - a is always allowed
            a, b = b, a
            results = {"-": a - b}
        op = rng.choice(sorted(results))
        left.append(results[op])
        steps.append(f"{a}{op}{b}={results[op]}")
    return {"numbers": given, "target": left[0]}, ", ".join(steps)


def countdown(count: int, *, heldout: bool, numbers: int, largest: int, limit: int) -> list[dict]:
    """Generate `count` different Countdown problems from one side of the split.

    The same arguments give the same problems.
    """
    rng = random.Random(f"countdown {heldout}")
    problems: dict[str, dict] = {}
    # an upper bound: the numbers in any order, times the targets
    possible = math.comb(largest + numbers - 1, numbers) * (limit + 1)
    attempts = min(100 * count, 2_000_000) if count <= possible else 0
    for _ in range(attempts):
        problem, _ = random_chain(rng, numbers=numbers, largest=largest, limit=limit)
        if is_heldout(**problem) == heldout:
            problems.setdefault(f"{sorted(problem['numbers'])} {problem['target']}", problem)
        if len(problems) == count:
            return list(problems.values())
    raise UserError(
        f"countdown: there are fewer than {count} different problems with numbers={numbers}, "
        f"largest={largest}, limit={limit}: ask for fewer, or raise one of these"
    )


# ---------------------------------------------------------------- files and data sets


def read_problems(source: str) -> list[dict]:
    """Read the problems of a file or data set.

    Rows without a usable gold answer are left out with a note. Countdown rows have "numbers" and
    "target"; rows with mathematics have the fields of GSM8K, MATH and similar sets, see
    `math_problem`. Raises UserError, with file and line, for a row that is neither.
    """
    problems = []
    without_answer = []
    for place, row in read_rows(BENCHMARKS.get(source, source)):
        try:
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            if "numbers" in row:
                problem = countdown_problem(row)
            else:
                problem = math_problem(row)
            if problems and problem.keys() != problems[0].keys():
                raise ValueError("Countdown and mathematics cannot be in one file")
        except ValueError as error:
            raise UserError(f"{source}, {place} is not a problem: {error}") from None
        if problem.get("answer") == "":
            without_answer.append(place)
        else:
            problems.append(problem)
    require(
        bool(problems), f"{source} has no problem with a gold answer: give a file with at least one"
    )
    if without_answer:
        note(
            f"{len(without_answer)} rows of {source} have no usable gold answer and are left out: "
            f"{', '.join(without_answer[:10])}"
        )
    return problems


def read_rows(source: str) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of a local .jsonl file, or of what `datasets` loads.

    The place is for error messages.
    """
    if not source.endswith(".jsonl"):
        for number, row in enumerate(load_dataset(source), start=1):
            yield f"row {number}", row
        return
    try:
        # -sig drops the byte order mark that some editors write at the start
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(
                    f"{source}, line {number} is not JSON: give one JSON object a line"
                ) from None


def load_dataset(source: str):
    """Load a local .json, .csv or .parquet file, or a data set from the hub.

    A data set from the hub is written owner/name@split or owner/name:config@split.
    """
    builder = Path(source).suffix.removeprefix(".")
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?@([\w.-]+)", source)
    is_file = builder in ("json", "csv", "parquet") and Path(source).is_file()
    require(
        is_file or hub is not None,
        f"{source}: there is no such file; give a .jsonl, .json, .csv or .parquet file, "
        "or a data set on the hub as owner/name@split or owner/name:config@split",
    )
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: pip install datasets, or give a local .jsonl file") from None
    try:
        if is_file:
            return datasets.load_dataset(builder, data_files=source, split="train")
        return datasets.load_dataset(hub[1], hub[2], split=hub[3])
    except Exception as error:  # the library and the hub's client raise many kinds of errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{source} cannot be loaded ({reason}): check the name and the network"
        ) from None


def countdown_problem(row: dict) -> dict:
    numbers = row.get("numbers")
    target = row.get("target")
    # type() and not isinstance(), because True is an int
    if not (
        isinstance(numbers, list) and numbers and {type(x) for x in [*numbers, target]} == {int}
    ):
        raise ValueError('it needs "numbers": [whole numbers] and "target": a whole number')
    return {"numbers": numbers, "target": target}


def math_problem(row: dict) -> dict:
    """Turn a row of a data set into {"problem": text, "answer": text}.

    The text is read from the field problem, question or prompt, and the answer from answer, or else
    from solution. The answer is "" if the row has no usable one.
    """
    row = {str(key).lower(): value for key, value in row.items()}
    field = next((name for name in ("problem", "question", "prompt") if name in row), None)
    if field is None:
        fields = ", ".join(row) or "none"
        raise ValueError(f'it has no "problem", "question" or "prompt", its fields are {fields}')
    text = row[field]
    # a lone surrogate is half a character and cannot be tokenized
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        raise ValueError(f'"{field}" must be text, not {json.dumps(text)[:40]}')
    answer = gold_answer(row.get("answer"), "answer")
    if not answer:
        answer = gold_answer(row.get("solution"), "solution")
    return {"problem": text.strip(), "answer": answer}


# ---------------------------------------------------------------- prompts


def format_prompt(template: str, problem: dict) -> str:
    """Replace the names in braces by the problem's fields; other braces stay as they are."""
    if "numbers" in problem:
        numbers = " ".join(map(str, problem["numbers"]))
        return template.replace("{numbers}", numbers).replace("{target}", str(problem["target"]))
    return template.replace("{problem}", problem["problem"])


def prompt_ids(tokenizer, problems: list[dict], prompt) -> list[list[int]]:
    """Return the token ids of the problems' prompts; `prompt` is config.prompt.

    They are the same in training and in evaluation.
    """
    chat = tokenizer.chat_template is not None and prompt.chat == "auto"
    texts = []
    for problem in problems:
        if "numbers" in problem:
            template = prompt.countdown
        elif chat:
            template = prompt.math
        else:
            template = prompt.plain
        texts.append(format_prompt(template, problem))
    return models.encode_prompts(tokenizer, texts, chat=chat, system=prompt.system)


def drop_long_prompts(problems: list[dict], tokenizer, context: int, config) -> list[dict]:
    """Leave out problems whose prompt and completion do not fit the model's context."""
    lengths = [len(ids) for ids in prompt_ids(tokenizer, problems, config.prompt)]
    fitting = [
        problem
        for problem, length in zip(problems, lengths)
        if length + config.max_new_tokens <= context
    ]
    message = (
        f"max_new_tokens={config.max_new_tokens}: with prompts of up to {max(lengths)} tokens "
        f"{len(fitting)} of {len(problems)} problems fit the model's context of {context}"
    )
    require(len(fitting) >= config.prompts_per_step, f"{message}: lower it or shorten the prompt")
    if len(fitting) < len(problems):
        note(f"{message}; the others are left out of training")
    return fitting


# ---------------------------------------------------------------- training and held-out problems


def load_problems(config) -> tuple[list[dict], dict[str, list[dict]]]:
    """Return the problems to train on, and the held-out problems by file; none is in both.

    evaluation.data=auto holds out the share validation_fraction of a mathematics file, and for
    Countdown generates problems from the held-out side of the split.
    """
    names = split_list(config.evaluation.data)
    heldout: dict[str, list[dict]] = {}
    for name in names:
        heldout[name] = []
        if name != "auto":
            heldout[name] = read_problems(name)
    if config.data == "countdown":
        problems = countdown(config.countdown_problems, heldout=False, **vars(config.countdown))
    else:
        rows = read_problems(config.data)
        fraction = config.validation_fraction
        evaluated = {problem_key(problem) for file in heldout.values() for problem in file}
        problems = []
        for row in rows:
            if problem_key(row) in evaluated:
                continue
            if "auto" not in names or not is_held_out(row, fraction):
                problems.append(row)
            elif "numbers" not in row:
                heldout["auto"].append(row)
        if len(problems) < len(rows):
            note(
                f"{len(rows) - len(problems)} of {len(rows)} problems of {config.data} are held "
                "out for evaluation: left out of training"
            )
        require(
            "auto" not in names or "numbers" in rows[0] or bool(heldout["auto"]),
            f"validation_fraction={fraction} of {config.data} is no problem at all: raise it, or "
            "give evaluation.data=FILE",
        )
    if heldout.get("auto") == []:
        heldout["auto"] = countdown(
            config.evaluation.problems, heldout=True, **vars(config.countdown)
        )
    require(
        len(problems) >= config.prompts_per_step,
        f"prompts_per_step={config.prompts_per_step}: there are only "
        f"{len(problems)} problems to train on: lower it, or give more",
    )
    for name in names:
        heldout[name] = sample_problems(heldout[name], config.evaluation.problems, name)
    return problems, heldout


def sample_problems(problems: list[dict], count: int, file: str) -> list[dict]:
    """Return at most `count` problems of a file, chosen by a hash of the problem, with a note.

    The first ones would be of one subject in a file that is sorted by subject.
    """
    if len(problems) <= count:
        return problems
    note(f"{file}: {count} of {len(problems)} problems, chosen by a hash of their text")
    return sorted(problems, key=lambda problem: zlib.crc32(problem_key(problem).encode()))[:count]


def is_held_out(problem: dict, fraction: float) -> bool:
    """Return whether a problem is held out for evaluation.data=auto; `fraction` is for mathematics.

    This depends on nothing but the problem's text, whatever its spaces.
    """
    if "numbers" in problem:
        return is_heldout(**problem)
    return zlib.crc32(problem_key(problem).encode()) < fraction * 2**32


def problem_key(problem: dict) -> str:
    """Return a key that is equal for equal problems.

    It is the text without extra spaces, or the sorted numbers and the target.
    """
    if "numbers" in problem:
        return str((sorted(problem["numbers"]), problem["target"]))
    return " ".join(problem["problem"].split())
