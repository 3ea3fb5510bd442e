"""Saves and loads checkpoints in runs/<name>/checkpoints/, from which a killed run is resumed.

A checkpoint holds the weights (a Hugging Face folder), every rank's share of the optimizer state,
and state.json with the step and fingerprints of what the run began with. It is written as
step-NNNNNN.tmp and then renamed to step-NNNNNN, so a folder without .tmp is complete. Random
numbers need no state, because they are a function of (seed, step, row, position).
"""

import json
import re
import shutil
from pathlib import Path

import torch

from support import models
from support.config import UserError, require
from support.log import versions


def save(run, step: int) -> None:
    """Save the run after `step` steps, then delete all but the newest `keep` checkpoints."""
    folder = run.folder / "checkpoints" / f"step-{step:06d}"
    unfinished = folder.with_name(f"{folder.name}.tmp")
    if run.world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        run.policy.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        state = {
            "step": step,
            "ranks": run.world.size,
            "fingerprints": run.fingerprints,
            "versions": versions(),
        }
        (unfinished / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    run.world.barrier()
    torch.save(run.optimizer.shard(), unfinished / f"optimizer-{run.world.rank}.pt")
    run.world.barrier()
    if run.world.is_main:
        unfinished.rename(folder)  # from here on the checkpoint exists, complete
        for old in checkpoints(run.folder)[: -run.config.keep]:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    paths = (folder / "checkpoints").glob("step-*")
    complete = [path for path in paths if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    complete = checkpoints(folder)
    return complete[-1] if complete else None


def load(run, folder: Path) -> int:
    """Restore weights and optimizer state from a checkpoint and return its step.

    Raises UserError if the run began with other data or another model. The model that the run began
    with is also the reference of the KL penalty.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        shards = [
            torch.load(
                folder / f"optimizer-{rank}.pt", map_location="cpu", weights_only=True, mmap=True
            )
            for rank in range(state["ranks"])
        ]
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} cannot be read ({reason}): delete that folder to resume from the one before"
        ) from None
    saved = state["fingerprints"]
    changed = [name for name, value in run.fingerprints.items() if saved.get(name) != value]
    require(
        not changed,
        f"resume: {', '.join(changed)} changed since the run in {run.folder} "
        "began: restore what it was, or start a run with another name=",
    )
    dtype = next(run.policy.parameters()).dtype
    run.policy.load_state_dict(models.load(str(folder), dtype)[0].state_dict())
    run.optimizer.load_shards(shards)
    return state["step"]
