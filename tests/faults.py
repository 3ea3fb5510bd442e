r"""Runs that are killed, and graders under hostile texts: the long form, by hand.

    python -m tests.faults kills 200         # SIGKILL at random moments, gone on with until the run is done
    python -m tests.faults operations        # a run for every file operation, killed before it, and gone on with
    python -m tests.faults texts 50000       # graders under random hostile texts: what they raise, and the slowest

A killed run must end with the metrics, samples, evaluations and weights of one that nobody disturbed, bit for bit.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import data
import train
from support import config as configs
from tests.helpers import SMALL

WORDS = [*SMALL, "name=killed", "resume=auto"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def begin(folder: Path, *, kill_before: int = -1) -> int:
    """Starts or goes on with the run, in a process of its own, which kills itself before that file operation."""
    child = os.fork()  # torch is there already: a start takes no seconds
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        operations = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal operations
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes and not str(arguments[0]).startswith("/dev") or event in CHANGES:
                operations += 1
                if operations > kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_before >= 0:
            sys.addaudithook(count)
        train.main(configs.training_keys(WORDS))
        status = 0
        if kill_before >= 0:
            os.write(log, f"operations: {operations}\n".encode())
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """How a process ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path) -> dict:
    """What must not differ."""
    run, found = folder / "runs" / "killed", {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [{key: value for key, value in row.items() if key != "mem_gb" and not key.startswith("time/")}
                       for row in rows]
    for name in ("evaluation.json", "model/model.safetensors", "model/tokenizer.json"):
        found[name] = (run / name).read_bytes()
    return found


def finish(folder: Path) -> None:
    child = begin(folder)
    if ended(child):
        raise AssertionError(f"cannot go on: {(folder / 'log.txt').read_text()[-2000:]}")


def undisturbed(folder: Path) -> tuple[dict, int]:
    """The run's result, and how many file operations it takes."""
    folder.mkdir()
    assert ended(begin(folder, kill_before=10**9)) == 0, (folder / "log.txt").read_text()
    return result(folder), int((folder / "log.txt").read_text().rpartition("operations: ")[2])


def kills(folder: Path, count: int) -> Iterator[str]:
    """Runs, each killed at random moments until it is done, with so many kills in all."""
    expected, _ = undisturbed(folder / "whole")
    rng, done, runs = random.Random(0), 0, 0
    with tqdm(total=count, unit="kill", disable=None) as bar:
        while done < count:
            own, alive, runs = folder / f"run-{runs}", True, runs + 1
            own.mkdir()
            while alive and done < count:
                child = begin(own)
                time.sleep(rng.uniform(0, 3))
                os.kill(child, signal.SIGKILL)
                status = ended(child)
                alive = status == -signal.SIGKILL
                if status not in (0, -signal.SIGKILL):
                    yield f"run {runs}, kill {done}: exit code {status}: {(own / 'log.txt').read_text()[-500:]}"
                    break
                done += alive
                bar.update(alive)
            finish(own)
            different = [name for name, value in result(own).items() if value != expected[name]]
            if different:
                yield f"run {runs}: other {', '.join(different)}"
    print(f"{done} kills in {runs} runs")


def operations(folder: Path, every: int = 1) -> Iterator[str]:
    """One run for every file operation, killed before it."""
    expected, count = undisturbed(folder / "whole")
    for number in tqdm(range(0, count, every), unit="operation", disable=None):
        own = folder / f"before-{number}"
        own.mkdir()
        if ended(begin(own, kill_before=number)) != -signal.SIGKILL:
            yield f"operation {number}: not killed"
        finish(own)
        different = [name for name, value in result(own).items() if value != expected[name]]
        if different:
            yield f"operation {number}: other {', '.join(different)}"
    print(f"{len(range(0, count, every))} kills, before file operations of {count}")


PIECES = [r"\frac", r"\sqrt", r"\boxed", r"\pm", r"\sin", r"\text", r"\begin{pmatrix}", r"\end{pmatrix}", r"\left",
          *"{}()[]^_!|%$&+-*/=<,. \n\0²٣\ud800\u202exie19", r"\cup", "\\\\", "17", "9" * 40, "x_{1}", "^{64}"]


def hostile_text(rng: random.Random) -> str:
    """Noise, one piece again and again, brackets within brackets, or a long line; 1 to a million characters."""
    size = int(10 ** rng.uniform(0, 6 if rng.random() < 0.05 else 3))
    kind, one, other = rng.randrange(4), rng.choice(PIECES), rng.choice(PIECES)
    if kind == 0:
        text = "".join(rng.choices(PIECES, k=size // 2))
    elif kind == 1:
        text = (one + other) * (size // 2)
    elif kind == 2:
        opening, closing = rng.choice(["{}", "()", "[]", ("\\frac{1}{", "}"), ("\\sqrt{2+", "}"), ("9^{", "}")])
        text = opening * (size // 4) + one + closing * (size // 4)
    else:
        text = "".join(rng.choices("0123456789abcxyz +-*/^=(){}\\,.", k=size))
    return rng.choice([text, rf"\boxed{{{text}}}", rf"\boxed{{{text}"])[: size + 9]


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """The exact grader and Countdown's check on random texts and gold answers: what they raise, and the slowest."""
    rng, slowest = random.Random(seed), (0.0, "")
    for _ in tqdm(range(count), unit="text", disable=None):
        text, gold = hostile_text(rng), hostile_text(rng)[:300]
        for problem in ({"problem": "?", "answer": gold}, {"numbers": [1, 2, 3], "target": 6}):
            started = time.process_time()
            try:
                data.is_correct(problem, text, "exact")
                data.answer_of(problem, text, "exact")
            except Exception as error:
                yield f"{error!r} of {text[:80]!r} against {gold[:80]!r}"
            slowest = max(slowest, (time.process_time() - started, f"{text[:60]!r} against {gold[:60]!r}"))
    print(f"{count} texts; the slowest took {1000 * slowest[0]:.0f} ms: {slowest[1]}")
    if slowest[0] > 0.05:
        yield "slower than 50 ms"


def main(what: str, *numbers: str) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [] if what == "texts" else [Path(folder)]
        faults = 0
        for fault in {"kills": kills, "operations": operations, "texts": texts}[what](*arguments, *map(int, numbers)):
            faults += 1
            tqdm.write(f"FAULT {fault}")
    print(f"{faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
