"""A run's folder, runs/<name>/: its logs, its checkpoint, and what a killed run needs to go on."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import config as configs
import distributed
import rollout

# Keys that a resumed run may give anew: they change speed, memory or what is written, not the training.
MAY_DIFFER = {"resume", "name", "recipe", "dry_run", "micro_batch_size", "logits_chunk", "gradient_checkpointing",
              "rollout.batch_size", "rollout.segment", "log_every", "save_every"}  # fmt: skip


def run_folder(config, keys: dict) -> Path:
    """runs/<name>, refused if another run is in it, or if `resume` would go on with other settings."""
    name = config.name
    if name == "auto":
        data = "-".join(word for word in Path(config.data.file).with_suffix("").parts[-2:] if word.strip("/."))
        words = [Path(config.model).name, data, config.reward.kind, config.objective, config.selection.strategy]
        name = "-".join([word for word in words if word not in ("toy", "accuracy", "grpo")] + [f"seed{config.seed}"])
    folder = Path("runs") / name
    stored = folder / "config.yaml"
    if config.resume:
        configs.require(stored.is_file(), f"resume=true: {folder} holds no run; leave resume out to start one")
        old = configs.flatten(yaml.safe_load(stored.read_text()))
        for key in sorted(keys.keys() - MAY_DIFFER):
            configs.require(old.get(key) == keys[key],
                            f"resume=true: {key}={keys[key]}, but the run in {folder} has {old.get(key)}; "
                            f"give {key}={old.get(key)}, or start a run of another name=")  # fmt: skip
    else:
        configs.require(not folder.exists() or not any(folder.iterdir()),
                        f"{folder} already holds a run: give another name=, resume=true to go on with it, "
                        "or delete the folder")  # fmt: skip
    return folder


def begin(folder: Path, keys: dict) -> None:
    """Makes the folder with its config.yaml, whole or not at all; a resumed run keeps the one it has."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        configs.replace_text(folder / "config.yaml", yaml.safe_dump(configs.nest(keys), sort_keys=False))


class Log:
    """metrics.jsonl and samples.jsonl, one JSON object a line.

    Lines after step `start` were written by a run that was killed before it saved that step: dropped,
    and with them a final evaluation, which is done again.
    """

    def __init__(self, folder: Path, start: int):
        self.folder = folder
        for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
            lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and self.stays(json.loads(line), start)]
            configs.replace_text(path, "".join(kept))

    @staticmethod
    def stays(row: dict, start: int) -> bool:
        final = row["step"] > 0 and row.keys().isdisjoint({"loss", "completion"})
        return row["step"] <= start and not final

    def metrics(self, row: dict) -> None:
        self._append("metrics.jsonl", row)

    def sample(self, step: int, prompt: str, completion: str, reward: float) -> None:
        tqdm.write(f"  {prompt} {completion}   [reward {reward:g}]")
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "completion": completion, "reward": reward})

    def _append(self, name: str, row: dict) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, which then takes the place of `folder`: a kill leaves the old one or the new one."""
    unfinished, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)  # a kill between these two renames leaves `old`, which load finds
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, step: int, policy, tokenizer, optimizer) -> None:
    """Weights (an HF folder), optimizer state and step, by rank 0 while the others wait."""
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer: the shards come to rank 0
        optimizer.consolidate_state_dict(to=0)
    if distributed.rank() == 0:
        with replaced(folder / "checkpoint") as unfinished:
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            torch.save({"step": step, "optimizer": optimizer.state_dict()}, unfinished / "trainer.pt")
    distributed.barrier()


def load(folder: Path, policy, optimizer) -> int:
    """Restores weights and optimizer state; returns the steps done, 0 where none was saved yet."""
    for saved in (folder / "checkpoint", folder / "checkpoint.old"):
        if (saved / "trainer.pt").is_file():
            policy.load_state_dict(rollout.load(str(saved))[0].state_dict())
            state = torch.load(saved / "trainer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            return state["step"]
    return 0
