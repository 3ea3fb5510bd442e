"""Names a run and writes its folder runs/<name>/: settings, metrics and samples."""

import importlib.util
import json
import math
import platform
import re
import subprocess
import uuid
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from support.config import flatten, read_defaults, read_recipe, read_run_config, require, to_yaml
from support.files import append_row, fingerprint, read_jsonl, replace_text

# A resumed run may change these settings: they change speed, memory or what is written, but not the
# training.
FREE_ON_RESUME = {
    "resume",
    "name",
    "recipe",
    "dry_run",
    "micro_batch_size",
    "micro_batch_tokens",
    "logits_chunk",
    "offload",
    "gradient_checkpointing",
    "rollout.batch_size",
    "rollout.segment",
    "log_every",
    "save_every",
    "keep",
    "wandb",
    "max_bad_steps",
    "distributed_timeout",
}


def open_run_folder(config) -> tuple[Path, bool]:
    """Return the folder of the run, and whether it holds a run to resume. Nothing is written.

    Raises UserError if another run is in the folder, or if a resumed run would continue with other
    settings.
    """
    require(
        not config.wandb or importlib.util.find_spec("wandb") is not None,
        f"wandb={config.wandb}: pip install wandb, or leave wandb out",
    )
    name = config.name
    if name == "auto":
        name = run_name(config)
    folder = Path("runs") / name
    before = read_run_config(folder)
    if config.resume is False or (config.resume == "auto" and not before):
        entries = []
        if folder.is_dir():  # a run killed at its very start leaves only `lock` and .tmp
            entries = [
                path for path in folder.iterdir() if path.name != "lock" and path.suffix != ".tmp"
            ]
        require(
            not entries,
            f"{folder} already holds a run: give another name=, resume=true to "
            "continue it, or delete the folder",
        )
        return folder, False
    require(bool(before), f"resume=true: {folder} holds no run; leave resume out to start one")
    changed = []
    for key, value in flatten(config).items():
        if key not in FREE_ON_RESUME and before.get(key) != value:
            changed.append(f"{key}={before.get(key)}, not {value}")
    require(
        not changed,
        f"resume=true: the run in {folder} has {', '.join(changed)}: leave these arguments out, or "
        "start a run with another name=",
    )
    return folder, True


def run_name(config) -> str:
    """Name a run by what differs from the defaults, such as countdown-scope-seed0-steps50."""
    flat = flatten(config)
    usual = read_defaults()
    words = []
    for key in ("model", "data", "reward", "objective"):
        if flat[key] != usual[key] or key == "data":
            # only these suffixes: that of Qwen2.5-7B would be .5-7B
            text = re.sub(r"\.(jsonl?|csv|parquet)$", "", flat[key])
            words.append("-".join(Path(text).parts[-2:]).strip("/.-"))
    words += [flat["selection.strategy"], f"seed{flat['seed']}"]
    in_name = {"model", "data", "reward", "objective", "selection.strategy", "seed"}
    if flat["recipe"]:
        usual |= read_recipe(flat["recipe"])
    for key, value in flat.items():
        if key in usual and value != usual[key] and key not in FREE_ON_RESUME | in_name:
            words.append(f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}")
    name = re.sub(r"[^\w.+-]+", "_", "-".join(words))
    if len(name) > 100:
        name = f"{name[:90]}-{fingerprint(name)}"
    return name


class Log:
    """Writes metrics.jsonl and samples.jsonl, one JSON object a line, and prints.

    On ranks other than 0 it does nothing. Lines that a killed run wrote after its last checkpoint,
    that of step `start`, are dropped, because they will be written again: those of later steps and
    the evaluation after the last one.
    """

    def __init__(self, folder: Path, config, start: int, *, active: bool):
        self.folder = folder
        self.active = active
        self.wandb = None
        if not active:
            return
        flat = flatten(config)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            replace_text(folder / "config.yaml", to_yaml(flat | {"resume": False}))
        for name in ("metrics.jsonl", "samples.jsonl"):
            text = ""
            for row in read_jsonl(folder / name):
                evaluated_again = row["step"] == config.steps and "eval/pass@1" in row
                if start > 0 and row["step"] <= start and not evaluated_again:
                    text += json.dumps(row) + "\n"
            replace_text(folder / name, text)
        if config.wandb:
            self.wandb = start_wandb(folder, config.wandb, flat)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics."""
        if not self.active:
            return
        row = {"step": step}
        for name, value in metrics.items():
            row[name] = value if math.isfinite(value) else None  # JSON has no NaN
        append_row(self.folder / "metrics.jsonl", row)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def sample(self, step: int, prompt: str, completion: str, reward: float) -> None:
        """Print a completion and write it to samples.jsonl."""
        if not self.active:
            return
        self.print(f"  {prompt} {completion}   [reward {reward:g}]")
        row = {"step": step, "prompt": prompt, "completion": completion, "reward": reward}
        append_row(self.folder / "samples.jsonl", row)

    def print(self, text: str) -> None:
        """Print without breaking a progress bar."""
        if self.active:
            tqdm.write(text)


def start_wandb(folder: Path, project: str, flat: dict):
    """Start a Weights & Biases run, or continue the one that belongs to this folder.

    WANDB_MODE=offline works without a network.
    """
    import wandb  # an optional package; open_run_folder has checked that it is there

    stored = folder / "wandb-id.txt"
    if not stored.exists():
        replace_text(stored, uuid.uuid4().hex[:12])
    return wandb.init(
        project=project,
        name=folder.name,
        id=stored.read_text(),
        resume="allow",
        dir=folder,
        config=flat,
    )


def git(*arguments: str) -> str:
    """Return what git says about this repository, and "" where there is no git."""
    command = ["git", *arguments]
    try:
        output = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True)
    except OSError:
        return ""
    return output.stdout.decode().strip()


def versions() -> dict[str, str]:
    """Return the commit of this repository, the versions of its libraries, and the device."""
    commit = git("describe", "--always")
    # runs add to results/ themselves
    if git("diff", "--name-only", "HEAD", "--", ".", ":!results"):
        commit += "-dirty"
    device = f"cpu ({platform.machine()})"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
