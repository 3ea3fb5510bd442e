"""A run's folder, runs/<name>/: its name, whether it may be used, and its logs."""

import json
import math
import os
import re
import uuid
import zlib
from pathlib import Path

from tqdm import tqdm

from support import config as configs
from support.files import append_line, read_log, remove, replace_text

# Keys that a resumed run may give anew: they change speed, memory or what is written, not the training.
MAY_DIFFER = {"resume", "name", "recipe", "dry_run", "micro_batch_size", "micro_batch_tokens", "logits_chunk",
              "offload", "gradient_checkpointing", "rollout.batch_size", "rollout.segment", "log_every",
              "save_every", "keep", "log.wandb", "max_bad_steps", "distributed_timeout"}
WRITTEN = {"config.yaml", "metrics.jsonl", "samples.jsonl", "base_evaluation", "checkpoints", "model",
           "evaluation.json"}  # by a run, the first one first


def run_folder(config, keys: dict) -> Path:
    """runs/<name>, refused if another run is in it, or if `resume` would go on with other settings."""
    folder = Path("runs") / (config.name if config.name != "auto" else auto_name(keys))
    stored = folder / "config.yaml"
    configs.require(len(os.fsencode(folder.name)) <= 200, f"name={folder.name}: give a name of at most 200 bytes")
    if config.resume == "auto" and not stored.is_file():
        config.resume = False
    if config.resume:
        configs.require(stored.is_file(), f"resume=true: {folder} holds no run; leave resume out to start one")
        old = configs.read_stored(stored)
        other = [key for key in sorted(keys.keys() - MAY_DIFFER) if old.get(key) != keys[key]]
        configs.require(not other, f"resume=true: the run in {folder} has "
                        + ", ".join(f"{key}={old.get(key)}, not {keys[key]}" for key in other)
                        + "; leave these words out, or start a run of another name=")
    else:
        configs.require(is_vacant(folder), f"{folder} already holds a run: give another name=, "
                        "resume=true to go on with it, or delete the folder")
    return folder


def is_vacant(folder: Path) -> bool:
    """Whether a run may start there: nothing of one is there, but what is left by one killed before its config.yaml."""
    return not folder.is_dir() or WRITTEN.isdisjoint(path.name for path in folder.iterdir())


NAMED = ("model", "data.file", "reward.kind", "objective", "selection.strategy", "seed")  # in a name by value alone


def auto_name(keys: dict) -> str:
    """Data, selection, seed, and what else differs from config.yaml or the recipe: countdown-scope-seed0-steps50."""
    usual = configs.read_defaults()
    words = [Path(keys["model"]).name, "-".join(part for part in Path(keys["data.file"]).with_suffix("").parts[-2:]
                                                if part.strip("/.")), keys["reward.kind"], keys["objective"]]
    words = [word for word in words if word not in (usual["model"], usual["reward.kind"], usual["objective"])]
    words += [keys["selection.strategy"], f"seed{keys['seed']}"]
    if keys["recipe"]:
        usual |= configs.recipe_keys([f"recipe={keys['recipe']}"], usual)
    for key, value in keys.items():
        if value != usual[key] and key not in MAY_DIFFER and key not in NAMED:
            last = key.rpartition(".")[2]
            others = [other for other in keys if other.rpartition(".")[2] == last and not other.startswith("toy.")]
            words.append((last if others == [key] else key) + (f"{value:g}" if type(value) is float else str(value)))
    name = re.sub(r"[^\w.+-]+", "_", "-".join(words))
    return name if len(name) <= 100 else f"{name[:90]}-{zlib.crc32(name.encode()):08x}"


def is_finished(folder: Path) -> bool:
    """Whether the run has its last table."""
    return (folder / "evaluation.json").is_file()


class Log:
    """A run's config.yaml, metrics.jsonl and samples.jsonl (one JSON object a line), and what it prints.

    Lines after step `start` were written by a run that was killed before it saved that step: dropped,
    and with them a final evaluation, which is done again.
    """

    def __init__(self, folder: Path, keys: dict, start: int, *, active: bool):
        """`active`: this is the rank that writes and prints; on the others nothing happens."""
        self.folder, self.keys, self.active, self.wandb = folder, keys, active, None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        logs = {path: read_log(path) for path in (folder / "metrics.jsonl", folder / "samples.jsonl")}
        for left in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:
            remove(left)  # by a killed process, and by no other: this one holds the lock
        stored = folder / "config.yaml"
        resumed = stored.exists()
        if start == 0:  # a resumed run keeps the one it has
            replace_text(stored, configs.write_yaml(configs.nest(keys | {"resume": False})))
        if resumed:
            last = max([row["step"] for row in logs[folder / "metrics.jsonl"]], default=0)
            again = f"steps {start + 1}-{last} are" if last > start + 1 else f"step {last} is"
            self.print((f"going on after step {start}" if start else "no step was saved yet: starting again")
                       + f"; {again} done again" * (last > start))
        for path, rows in logs.items():
            replace_text(path, "".join(json.dumps(row) + "\n" for row in rows if start and self.stays(row, start)))
        if keys["log.wandb"]:
            self.wandb = wandb_run(folder, keys)

    def stays(self, row: dict, start: int) -> bool:
        final = row["step"] == self.keys["steps"] and row.keys().isdisjoint({"loss", "completion"})
        return row["step"] <= start and not final

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step and "loss" not in row for row in read_log(self.folder / "metrics.jsonl"))

    def metrics(self, row: dict) -> None:
        self._append("metrics.jsonl", row)
        if self.wandb:
            self.wandb.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def sample(self, step: int, prompt: str, completion: str, reward: float) -> None:
        self.print(f"  {prompt} {completion}   [reward {reward:g}]")
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "completion": completion, "reward": reward})

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()

    def print(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def _append(self, name: str, row: dict) -> None:
        if self.active:
            append_line(self.folder / name, json.dumps({key: finite(value) for key, value in row.items()}))


def wandb_run(folder: Path, keys: dict):
    """A run of Weights & Biases; a resumed one goes on under its own id. Offline with WANDB_MODE=offline."""
    import wandb

    stored = folder / "wandb-id.txt"
    if not stored.is_file():
        replace_text(stored, uuid.uuid4().hex[:12])
    return wandb.init(project=keys["log.wandb"], name=folder.name, id=stored.read_text(), resume="allow", dir=folder,
                      config=keys)


def finite(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
