"""A run's folder, runs/<name>/: its logs, its checkpoint, and what a killed run needs to go on."""

import json
import re
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from support import config as configs
from support import distributed, models
from support.files import replace_folder, replace_text
from support.trackers import trackers

# Keys that a resumed run may give anew: they change speed, memory or what is written, not the training.
MAY_DIFFER = {"resume", "name", "recipe", "dry_run", "micro_batch_size", "micro_batch_tokens", "logits_chunk",
              "offload", "fit_batches", "gradient_checkpointing", "rollout.batch_size", "rollout.segment", "log_every",
              "save_every", "log.wandb", "log.tensorboard"}
SHARD = "optimizer-{}.pt"  # of each rank


def run_folder(config, keys: dict) -> Path:
    """runs/<name>, refused if another run is in it, or if `resume` would go on with other settings.

    More steps than before are the one exception, under a constant rate: the warm-up in config and keys is adapted.
    """
    folder = Path("runs") / (config.name if config.name != "auto" else auto_name(keys))
    stored = folder / "config.yaml"
    if config.resume == "auto":
        config.resume = keys["resume"] = stored.is_file()
    if config.resume:
        configs.require(stored.is_file(), f"resume=true: {folder} holds no run; leave resume out to start one")
        old = configs.flatten(configs.read_yaml(stored.read_text()))
        other = [key for key in sorted(keys.keys() - MAY_DIFFER) if old.get(key) != keys[key]]
        if "steps" in other and config.optimizer.schedule == "constant" and keys["steps"] > old["steps"]:
            other.remove("steps")  # the warm-up keeps its steps
            keys["optimizer.warmup"] = config.optimizer.warmup = old["optimizer.warmup"] * old["steps"] / keys["steps"]
        configs.require(not other, f"resume=true: the run in {folder} has "
                        + ", ".join(f"{key}={old.get(key)}, not {keys[key]}" for key in other)
                        + "; leave these words out, or start a run of another name="
                        + " (more steps need optimizer.schedule=constant)" * ("steps" in other))
    else:
        configs.require(not folder.exists() or not any(path.name != "lock" for path in folder.iterdir()),
                        f"{folder} already holds a run: give another name=, resume=true to go on with it, "
                        "or delete the folder")
    return folder


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


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run has its last table, of so many steps."""
    if not (folder / "evaluation.json").is_file():
        return False
    return configs.read_yaml((folder / "config.yaml").read_text())["steps"] == steps


class Log:
    """A run's config.yaml, metrics.jsonl and samples.jsonl (one JSON object a line), and what it prints.

    Lines after step `start` were written by a run that was killed before it saved that step: dropped,
    and with them a final evaluation, which is done again.
    """

    def __init__(self, folder: Path, keys: dict, start: int, *, active: bool):
        """`active`: this is the rank that writes and prints; on the others nothing happens."""
        self.folder, self.keys, self.active, self.trackers = folder, keys, active, []
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "config.yaml"  # a resumed run keeps the one it has, unless it is to take more steps
        if not stored.exists() or configs.read_yaml(stored.read_text())["steps"] < keys["steps"]:
            (folder / "evaluation.json").unlink(missing_ok=True)
            replace_text(stored, yaml.safe_dump(configs.nest(keys | {"resume": False}), sort_keys=False))
        for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
            lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and self.stays(json.loads(line), start)]
            replace_text(path, "".join(kept))
        self.trackers = trackers(folder, keys, start)

    def stays(self, row: dict, start: int) -> bool:
        final = row["step"] == self.keys["steps"] and row.keys().isdisjoint({"loss", "completion"})
        return row["step"] <= start and not final

    def metrics(self, row: dict) -> None:
        self._append("metrics.jsonl", row)
        for tracker in self.trackers:
            tracker.metrics(row)

    def sample(self, step: int, prompt: str, completion: str, reward: float) -> None:
        self.print(f"  {prompt} {completion}   [reward {reward:g}]")
        row = {"step": step, "prompt": prompt, "completion": completion, "reward": reward}
        self._append("samples.jsonl", row)
        for tracker in self.trackers:
            tracker.sample(row)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def print(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def _append(self, name: str, row: dict) -> None:
        if self.active:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(row) + "\n")


def save(folder: Path, step: int, policy, tokenizer, optimizer) -> None:
    """Weights (an HF folder) and step by rank 0, and of every rank its share of the optimizer's state."""
    target, main = folder / "checkpoint", distributed.rank() == 0
    with replace_folder(target) if main else nullcontext(target.with_name("checkpoint.tmp")) as unfinished:
        distributed.barrier()  # the folder is there
        if main:
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        shard = {"step": step, "ranks": distributed.size(), "optimizer": optimizer.shard()}
        torch.save(shard, unfinished / SHARD.format(distributed.rank()))
        distributed.barrier()  # and whole
    distributed.barrier()


def load(folder: Path, policy, optimizer) -> int:
    """Restores weights and optimizer state; returns the steps done, 0 where none was saved yet."""
    for saved in (folder / "checkpoint", folder / "checkpoint.old"):
        configs.require(not (saved / "trainer.pt").is_file(), f"{saved} is of an earlier version of this code, which "
                                                              "cannot be gone on with: start a run of another name=")
        if (saved / SHARD.format(0)).is_file():
            policy.load_state_dict(models.load(str(saved), next(policy.parameters()).dtype)[0].state_dict())
            ranks = read_shard(saved, 0)["ranks"]
            shards = [read_shard(saved, rank) for rank in range(ranks)]  # by any number of ranks
            try:
                optimizer.load_shards([shard["optimizer"] for shard in shards])
            except KeyError as error:
                raise configs.UserError(f"{saved} does not hold what is needed of {error}: it was saved with another "
                                        "precision=, or not whole") from None
            return shards[0]["step"]
    return 0


def read_shard(saved: Path, rank: int) -> dict:
    return torch.load(saved / SHARD.format(rank), map_location="cpu", weights_only=True, mmap=True)
