"""A run's saves, runs/<name>/checkpoints/step-NNNNNN/: what a killed run goes on from.

Each holds the weights (an HF folder), of every rank its share of the optimizer's state, and manifest.json: the step,
fingerprints of what the run began with, versions, and size and checksum of every file. That one is written last: a
save without it is not whole, and the one before is taken.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from support import distributed, models, processes, runs
from support.config import UserError, print_notes, require
from support.files import DiskError, checksum, json_sum, remove, sync, written

MANIFEST = "manifest.json"
SHARD = "optimizer-{}.pt"  # of each rank


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(saved: Path) -> int:
    return int(saved.name.removeprefix("step-"))


def saves(folder: Path) -> list[Path]:
    """Finished or damaged, the newest first."""
    return sorted((path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)),
                  key=step_of, reverse=True)


# ---------------------------------------------------------------- writing


def save(folder: Path, step: int, run) -> None:
    """Saves after so many steps, then deletes all but the newest `keep` saves."""
    target, main = folder / "checkpoints" / name_of(step), distributed.rank() == 0
    unfinished = target.with_name(f"{target.name}.tmp")

    def begin() -> None:
        remove(unfinished)
        unfinished.mkdir(parents=True)

    def finish(marks: dict) -> None:
        for log in folder.glob("*.jsonl"):  # a save holds its steps' lines
            sync(log)
        body = {"step": step, "ranks": distributed.size(), "inputs": run.inputs, "versions": processes.versions(),
                "files": marks}
        (unfinished / MANIFEST).write_text(json.dumps(body | {"own": json_sum(body)}, indent=1) + "\n")
        sync(unfinished / MANIFEST)
        sync(unfinished)
        remove(target)  # a damaged one, passed over when this process began
        unfinished.rename(target)
        sync(target.parent)

    try:
        on_all_ranks(target, lambda: begin() if main else None)
        marks = on_all_ranks(target, lambda: write_share(unfinished, step, run))
        on_all_ranks(target, lambda: finish({k: v for part in marks for k, v in part.items()}) if main else None)
    except DiskError:
        if main:
            remove(unfinished)  # its room is needed
        raise
    if main:
        whole = [path for path in saves(folder) if step_of(path) <= step and not fault(path, sums=False)]
        for path in set(saves(folder)) - set(whole[: run.config.keep]):
            remove(path)


def on_all_ranks(path: Path, work: Callable) -> list:
    """What `work` returns on each; a disk that is full for one is full for all, so that they end alike."""
    done, trouble = None, ""
    try:
        with written(path):
            done = work()
    except DiskError as error:
        trouble = str(error)
    found = distributed.gather_objects((done, trouble))
    if told := next((trouble for _, trouble in found if trouble), ""):
        raise DiskError(told)
    return [done for done, _ in found]


def write_share(folder: Path, step: int, run) -> dict[str, list]:
    """This rank's files: its share of the optimizer, and of rank 0 the model. Returns {name: [size, checksum]}."""
    shard = folder / SHARD.format(distributed.rank())
    with shard.open("wb") as file:
        torch.save({"step": step, "ranks": distributed.size(), "optimizer": run.optimizer.shard()}, file)
    own = [shard]
    if distributed.rank() == 0:
        run.policy.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        own += [path for path in folder.rglob("*") if path.is_file() and not path.match(SHARD.format("*"))]
    for path in {*own, *(path.parent for path in own)}:  # a tokenizer of several chat templates has a folder of them
        sync(path)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in own}


# ---------------------------------------------------------------- reading


def manifest(saved: Path) -> tuple[dict, str]:
    """What a save's manifest holds, and why it is none, "" if it is one."""
    try:
        body = json.loads((saved / MANIFEST).read_text())
    except OSError:
        return {}, f"it has no {MANIFEST}"
    except ValueError:
        body = None
    if not isinstance(body, dict) or body.pop("own", None) != json_sum(body) or name_of(body["step"]) != saved.name:
        return {}, f"its {MANIFEST} is damaged"
    return body, ""


def fault(saved: Path, *, sums: bool = True) -> str:
    """Why a save is not whole, "" if it is. With `sums`, on all ranks: every byte is read, by each its share of the
    files that rank 0 sees."""
    body, reason = distributed.gather_objects(manifest(saved))[0] if sums else manifest(saved)
    if reason:
        return reason
    if not sums:
        found = [wrong(saved / name, mark, sums=False) for name, mark in body["files"].items()]
    else:
        own = list(body["files"].items())[distributed.rank() :: distributed.size()]
        parts = distributed.gather_objects([wrong(saved / name, mark) for name, mark in own])
        found = [reason for part in parts for reason in part]
    return next(filter(None, found), "")


def wrong(file: Path, mark: list, *, sums: bool = True) -> str:
    size, total = mark
    try:
        if file.stat().st_size != size:
            return f"its {file.name} has {file.stat().st_size} bytes of {size}"
        return f"its {file.name} is not what was written" if sums and checksum(file) != total else ""
    except OSError as error:
        return f"its {file.name} cannot be read ({error.strerror})"


def newest(folder: Path, run) -> Path | None:
    """The newest whole save; None if the run was stopped before its first.

    Refused if there are saves and none is whole, if there must have been one, or if the run began with other inputs.
    """
    old = [path for path in (folder / "checkpoint", folder / "checkpoint.old") if path.exists()]
    require(not old or (folder / "checkpoints").exists(), f"{old and old[0]} is of an earlier version of this code, "
            "which cannot be gone on with: start a run of another name=")
    reasons = []
    for name in distributed.gather_objects([saved.name for saved in saves(folder)])[0]:  # nodes may not see the same
        saved = folder / "checkpoints" / name
        if not (reason := fault(saved)):
            print_notes([f"{text}: passed over" for text in reasons])
            check_inputs(saved, run)
            return saved
        reasons.append(f"{saved}: {reason}")
    require(not reasons, f"resume=true: no save is whole ({'; '.join(reasons)}): put one back, or delete {folder} to "
                         "start again")
    last, first = runs.last_step(folder), runs.first_save(folder, run.config)
    finished = (folder / "model").exists() or (folder / "evaluation.json").exists()
    require(last <= first and not finished,
            f"resume=true: {folder} has {last} steps in its log, the first save was due after {first}, and none is in "
            f"{folder}/checkpoints (there is none of steps that were not finite): put one back, or delete {folder} to "
            "start again")
    return None


def check_inputs(saved: Path, run) -> None:
    """A run goes on with what it began with; the initial model is also what KL is taken to."""
    body = json.loads((saved / MANIFEST).read_text())
    other = [key for key, mark in body["inputs"].items() if run.inputs.get(key) != mark]
    require(not other, f"resume=true: since the run in {saved.parents[1]} began, {', '.join(other)} changed: put back "
                       "what it was, or start a run of another name=")
    now = processes.versions()
    print_notes([f"{saved} was written by {name} {body['versions'].get(name)}, this is {now[name]}"
                 for name in ("torch", "transformers") if body["versions"].get(name) != now[name]])


def load(saved: Path, run) -> int:
    """Restores weights and optimizer state; returns the steps done."""
    weights = models.load(str(saved), next(run.policy.parameters()).dtype)[0].state_dict()
    run.policy.load_state_dict(weights)
    body = json.loads((saved / MANIFEST).read_text())
    shards = [read_shard(saved / SHARD.format(rank), body["step"]) for rank in range(body["ranks"])]
    try:
        run.optimizer.load_shards([shard["optimizer"] for shard in shards])  # by any number of ranks
    except (KeyError, ValueError) as error:
        raise UserError(f"{saved} does not hold what is needed of {error}: it was saved with another precision=, or "
                        "not whole") from None
    return body["step"]


def read_shard(file: Path, step: int) -> dict:
    try:
        shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # no pickle
        require(shard["step"] == step, f"{file} is of step {shard['step']}, not {step}")
        return shard
    except UserError:
        raise
    except Exception as error:  # whatever torch makes of a file that is not its own
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
