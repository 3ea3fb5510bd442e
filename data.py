"""Problems: the Countdown generator, problems from a file or the hub, their prompts and grades, and what is held out.

A problem is a dict. Countdown: {"numbers": [3, 5, 7, 2], "target": 24}, "use each number once to reach the target",
answered by a chain of steps: `3*5=15, 15+7=22, 22+2=24`. Mathematics: {"problem": text, "answer": final answer,
"level": int or None, "subject": text}, answered by a text that holds the answer in \\boxed{}.
"""

import json
import math
import random
import re
import zlib
from pathlib import Path

from grading import GRADERS, GraderError, answer_key, extract_answer, gold_answer
from rewards import solves_countdown
from support import models
from support.config import UserError, listed, print_notes, require
from support.files import file_name, replace_text
from support.rows import read_rows


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
    most = math.comb(largest + numbers - 1, numbers) * (limit + 1)  # numbers in any order, and a target
    for _ in range(min(100 * count, 2_000_000) if count <= most else 0):  # half a minute
        problem, _ = random_chain(rng, numbers=numbers, largest=largest, limit=limit)
        if is_heldout(**problem) == heldout:
            problems.setdefault(f"{sorted(problem['numbers'])} {problem['target']}", problem)
        if len(problems) == count:
            return list(problems.values())
    raise UserError(f"countdown: fewer than {count} different problems were found at numbers={numbers}, "
                    f"largest={largest}, limit={limit}: ask for fewer, or enlarge one of these")


def benchmarks(folder: Path, countdown_keys: dict) -> list[str]:
    """Files of held-out problems, made in `folder`: of training's kind, of others, and more of training's kind."""
    files = []
    kinds = {"4-numbers": (100, {}), "3-numbers": (64, {"numbers": 3}), "5-numbers": (64, {"numbers": 5}),
             "larger": (64, {"largest": 50}), "validation": (164, {})}
    for name, (count, changes) in kinds.items():
        problems = countdown(count, heldout=True, **countdown_keys | changes)
        rows = problems[100:] if name == "validation" else problems  # those after 4-numbers' own
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{name}.jsonl")
        replace_text(files[-1], "".join(json.dumps(row) + "\n" for row in rows))
    return [str(file) for file in files]


# ---------------------------------------------------------------- files


def read_problems(source: str, *, problem_field: str = "auto", answer_field: str = "auto") -> tuple[list, list[str]]:
    """The problems of a file or hub data set, and the places of the rows that hold no usable gold answer, left out.

    Countdown rows have "numbers" and "target". Rows with mathematics have the fields of GSM8K, MATH and their kin:
    see `math_problem`. Raises UserError, naming file and line, for a row that is neither.
    """
    problems, unusable = [], []
    for place, row in read_rows(source):
        try:
            if not isinstance(row, dict):
                raise ValueError("the row is no JSON object")
            problem = countdown_problem(row) if "numbers" in row else math_problem(row, problem_field, answer_field)
            if problems and problem.keys() != problems[0].keys():
                raise ValueError("Countdown and mathematics do not go into one file")
        except ValueError as error:
            raise UserError(f"data: {source}, {place} is no problem: {error}") from None
        if problem.get("answer") == "":
            unusable.append(place)
        else:
            problems.append(problem)
    if not problems:
        mend = f" that has a gold answer (data.answer_field={answer_field})" if unusable else ""
        raise UserError(f"data: {source} holds no problem: give a file with at least one row{mend}")
    return problems, unusable


def countdown_problem(row: dict) -> dict:
    numbers, target = row.get("numbers"), row.get("target")
    # type(), for True is an int to isinstance
    if not (isinstance(numbers, list) and numbers and {type(x) for x in [*numbers, target]} == {int}):
        raise ValueError('it needs "numbers": [whole numbers] and "target": a whole number')
    return {"numbers": numbers, "target": target}


def math_problem(row: dict, problem_field: str, answer_field: str) -> dict:
    """A row as its owner published it, as a problem; its answer is "" where it has no usable one.

    auto: the text is in problem, question or prompt; the answer in answer, or else in solution. A level may be
    5 or "Level 5", and a subject may be called type.
    """
    row = {str(key).lower(): value for key, value in row.items()}
    names = ["problem", "question", "prompt"] if problem_field == "auto" else [problem_field.lower()]
    field = next((name for name in names if name in row), None)
    if field is None:
        raise ValueError(f'it has no "{names[0]}"; its fields are {", ".join(row) or "none"}: name the one to read '
                         "with data.problem_field=")
    text = row[field]
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):  # half a character
        raise ValueError(f'"{field}" must be text, not {json.dumps(text)[:40]}')
    for name in ["answer", "solution"] if answer_field == "auto" else [answer_field.lower()]:
        answer = gold_answer(row.get(name), name)
        if answer:
            break
    level = re.search(r"\d+", str(row.get("level", "")))
    subject = row.get("subject") or row.get("type") or ""
    return {"problem": text.strip(), "answer": answer, "level": level and int(level[0]), "subject": str(subject)}


def matches(problem: dict, conditions: str) -> bool:
    """Whether a problem meets a data.filter such as "level=3-5; subject=Algebra,Geometry"."""
    for condition in filter(str.strip, conditions.split(";")):
        field, equals, values = (part.strip() for part in condition.partition("="))
        require(bool(equals and values) and field in ("level", "subject"),
                f'data.filter={conditions}: give level or subject, as in "level=3-5; subject=Algebra,Geometry"')
        value = problem.get(field)
        if field == "subject":
            fits = str(value).lower() in [word.strip().lower() for word in values.split(",")]
        else:
            ranges = [re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", word) for word in values.split(",")]
            require(all(ranges), f"data.filter={conditions}: give levels as numbers, level=3 or level=1,2 or level=3-5")
            bounds = [(int(part[1]), int(part[2] or part[1])) for part in ranges]
            fits = value is not None and any(low <= value <= high for low, high in bounds)
        if not fits:
            return False
    return True


# ---------------------------------------------------------------- prompts and grades


def fill(template: str, problem: dict) -> str:
    """The template with the problem's fields in place of their names in braces; other braces stand as they are."""
    if "numbers" in problem:
        numbers = " ".join(map(str, problem["numbers"]))
        return template.replace("{numbers}", numbers).replace("{target}", str(problem["target"]))
    return template.replace("{problem}", problem["problem"])


def render(problem: dict, prompt, *, chat: bool) -> str:
    """What the model is asked: the user's turn if the tokenizer has a chat template, else the whole prompt."""
    if "numbers" in problem:
        return fill(prompt.countdown, problem)
    return fill(prompt.math if chat else prompt.plain, problem)


def prompt_ids(tokenizer, problems: list[dict], prompt) -> list[list[int]]:
    """Token ids of the problems' prompts: the same in training, evaluation and analysis."""
    texts = [render(problem, prompt, chat=tokenizer.chat_template is not None) for problem in problems]
    return models.encode_prompts(tokenizer, texts, system=prompt.system)


def drop_long_prompts(problems: list[dict], tokenizer, context: int, config) -> list[dict]:
    """The problems whose prompt and completion fit the model's context; a note on the others."""
    lengths = [len(ids) for ids in prompt_ids(tokenizer, problems, config.prompt)]
    kept = [problem for problem, length in zip(problems, lengths) if length + config.max_new_tokens <= context]
    message = (f"max_new_tokens={config.max_new_tokens}: with prompts of up to {max(lengths)} tokens {len(kept)} of "
               f"{len(problems)} problems fit the model's context of {context}")
    require(len(kept) >= config.prompts_per_step, f"{message}; lower it or shorten the prompt")
    print_notes([f"{message}; the others are left out of training"] * (len(kept) < len(problems)))
    return kept


def is_correct(problem: dict, text: str, grader: str) -> bool:
    """Return whether a completion solves its problem, in mathematics by the verdict of the grader."""
    if "numbers" in problem:
        return solves_countdown(text, problem["numbers"], problem["target"])
    try:
        return GRADERS[grader](text, problem["answer"])
    except GraderError as error:
        raise UserError(f"reward.grader={grader}: {error}") from None


def answer_of(problem: dict, text: str, grader: str) -> str:
    """Return a text that completions share if they give the same answer.

    It is the chain without spaces, or the value of the boxed answer. Completions without a box are one answer to
    the exact grader, which reads nothing else; math_verify may find different answers in them.
    """
    if "numbers" in problem:
        return "".join(text.split())
    answer = extract_answer(text)
    if answer is not None:
        return answer_key(answer)
    return "" if grader == "exact" else text


# ---------------------------------------------------------------- what is trained on, and what is held out


def is_validation(problem: dict, share: float) -> bool:
    """True for that share of all problems; a pure function of the problem's text, whatever the file and its order."""
    return zlib.crc32(problem["problem"].encode()) < share * 2**32


def problems_of(config, name: str) -> tuple[list[dict], list[str]]:
    """The problems of a file, hub data set or benchmark, and a note on the rows left out."""
    problems, out = read_problems(vars(config.benchmarks).get(name, name), problem_field=config.data.problem_field,
                                  answer_field=config.data.answer_field)
    named = ", ".join(out[:10]) + (", ..." if len(out) > 10 else "")
    return problems, [f"{len(out)} rows of {name} have no usable gold answer and are left out: {named}"] if out else []


def problem_sets(config) -> tuple[list[dict], dict[str, list[dict]], list[str]]:
    """What a run trains on, what it evaluates on by file, which never overlap, and a note on rows that were left out.

    evaluation.data=auto: for a file of mathematics its data.validation share, else Countdown problems
    from the held-out side of the split.
    """
    file, notes = config.data.file, []
    files = {name: [] for name in listed(config.evaluation.data)}
    require(len({file_name(name) for name in files}) == len(files),
            f"evaluation.data={config.evaluation.data}: two of them would be called the same in runs/: rename one")
    for name in files.keys() - {"auto"}:
        files[name], more = problems_of(config, name)
        notes += more
    if file == "countdown":
        problems = countdown(config.countdown_problems, heldout=False, **vars(config.countdown))
    else:
        problems, more = problems_of(config, file)
        notes += more
        problems, out = partition(problems, lambda problem: matches(problem, config.data.filter))
        notes += note_on(out, problems, file, f"do not fit data.filter={config.data.filter}")
        require(bool(problems), f"data.filter={config.data.filter} leaves no problem of {file}: its levels are "
                                f"{values_of(out, 'level')}, its subjects {values_of(out, 'subject')}")
        seen = {identity(problem) for own in files.values() for problem in own}
        problems, out = partition(problems, lambda problem: identity(problem) not in seen)
        notes += note_on(out, problems, file, "are in evaluation.data too")
        if "auto" in files and "numbers" in problems[0]:
            problems, out = partition(problems, lambda problem: not is_heldout(**problem))
            notes += note_on(out, problems, file, "are on the side that evaluation.data=auto is drawn from")
        elif "auto" in files:
            problems, files["auto"] = partition(problems,
                                                lambda problem: not is_validation(problem, config.data.validation))
            reason = f"are the share data.validation={config.data.validation}, kept for evaluation.data=auto"
            notes += note_on(files["auto"], problems, file, reason)
            require(bool(files["auto"]), f"data.validation={config.data.validation} of {file} is no problem at all: "
                                         "raise it, or give evaluation.data=FILE")
    if not files.get("auto", True):
        files["auto"] = countdown(config.evaluation.problems, heldout=True, **vars(config.countdown))
    return problems, {name: own[: config.evaluation.problems] for name, own in files.items()}, notes


def identity(problem: dict) -> str:
    """What makes two rows one problem: the text whatever its spaces, or the numbers in any order and the target."""
    if "numbers" in problem:
        return str((sorted(problem["numbers"]), problem["target"]))
    return " ".join(problem["problem"].split())


def values_of(problems: list[dict], field: str) -> str:
    found = {str(problem.get(field)) for problem in problems if problem.get(field)}
    return ", ".join(sorted(found)[:10]) or "not given"


def partition(problems: list[dict], test) -> tuple[list[dict], list[dict]]:
    """Those that pass the test, and the others."""
    verdicts = [test(problem) for problem in problems]
    return [p for p, good in zip(problems, verdicts) if good], [p for p, good in zip(problems, verdicts) if not good]


def note_on(out: list[dict], kept: list[dict], file: str, reason: str) -> list[str]:
    return [f"{len(out)} of {len(out) + len(kept)} problems of {file} {reason}: left out of training"] if out else []
