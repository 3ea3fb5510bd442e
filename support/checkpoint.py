"""A run's saves, runs/<name>/checkpoints/step-NNNNNN/: what a killed run goes on from.

Each holds the weights (an HF folder), of every rank its share of the optimizer's state, and state.json: the step, the
number of ranks, and fingerprints of what the run began with. It is written as step-NNNNNN.tmp, which is then renamed.
"""

import json
import shutil
from pathlib import Path

import torch

from support import distributed, models
from support.config import require
from support.files import remove

STATE = "state.json"
SHARD = "optimizer-{}.pt"  # of each rank


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(saved: Path) -> int:
    return int(saved.name.removeprefix("step-"))


def saves(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted((path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".tmp"), key=step_of,
                  reverse=True)


def save(folder: Path, step: int, run) -> None:
    """Saves after so many steps, then deletes all but the newest `keep` saves."""
    target, main = folder / "checkpoints" / name_of(step), distributed.rank() == 0
    unfinished = target.with_name(f"{target.name}.tmp")
    if main:
        remove(unfinished)
        unfinished.mkdir(parents=True)
    distributed.barrier()
    torch.save(run.optimizer.shard(), unfinished / SHARD.format(distributed.rank()))
    if main:
        run.policy.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        state = {"step": step, "ranks": distributed.size(), "inputs": run.inputs}
        (unfinished / STATE).write_text(json.dumps(state, indent=1) + "\n")
    distributed.barrier()
    if main:
        unfinished.rename(target)
        for old in saves(folder)[run.config.keep :]:
            shutil.rmtree(old)


def newest(folder: Path, run) -> Path | None:
    """The newest save; None if there is none yet and resume=auto, which starts anew.

    Refused if the run began with other inputs.
    """
    found = saves(folder)
    if found:
        check_inputs(found[0], run)
        return found[0]
    require(run.config.resume == "auto", f"resume=true: {folder} has no save to go on from; resume=auto starts again")
    return None


def check_inputs(saved: Path, run) -> None:
    """A run goes on with what it began with; the initial model is also what KL is taken to."""
    began = json.loads((saved / STATE).read_text())["inputs"]
    other = [key for key, mark in began.items() if run.inputs.get(key) != mark]
    require(not other, f"resume=true: since the run in {saved.parents[1]} began, {', '.join(other)} changed: put back "
                       "what it was, or start a run of another name=")


def load(saved: Path, run) -> int:
    """Restores weights and optimizer state, by any number of ranks; returns the steps done."""
    weights = models.load(str(saved), next(run.policy.parameters()).dtype)[0].state_dict()
    run.policy.load_state_dict(weights)
    state = json.loads((saved / STATE).read_text())
    run.optimizer.load_shards([
        torch.load(saved / SHARD.format(rank), map_location="cpu", weights_only=True, mmap=True)  # no pickle
        for rank in range(state["ranks"])])
    return state["step"]
