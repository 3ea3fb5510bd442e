"""What settings must hold: key by key, one line for every mistake, before anything is loaded or written."""

import importlib.util
import math
import os
import re
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave: its message names the thing and the mend, on one line."""

    status = 2  # the exit code


class Halted(UserError):
    """A run that cannot go on, through no mistake in what it was given."""

    status = 1


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def listed(text: str) -> list[str]:
    """One word, or several as `[a,b]` or `a,b`."""
    words = [word.strip() for word in text.strip("[]").split(",")]
    require(all(words), f"{text}: give a word, or several as [a,b]")
    return words


MOST, LEAST = math.inf, 1e-9  # LEAST: of what must be above 0
RANGES = {  # of the numbers: the least and the most that each may be
    "seed": (0, 2**31 - 1), "steps": (1, MOST), "prompts_per_step": (1, MOST), "group_size": (2, MOST),
    "max_new_tokens": (1, MOST), "temperature": (0, MOST), "data.validation": (0, 1),
    "grpo.clip_low": (0, MOST), "grpo.clip_high": (0, MOST), "grpo.updates_per_rollout": (1, MOST),
    "selection.fraction": (0, 1), "selection.kl_coef": (0, MOST), "forking_fraction": (LEAST, 1 - LEAST),
    "optimizer.lr": (0, MOST), "optimizer.warmup": (0, 1), "optimizer.weight_decay": (0, MOST),
    "optimizer.max_grad_norm": (LEAST, MOST),
    "micro_batch_size": (1, MOST), "micro_batch_tokens": (0, MOST), "logits_chunk": (1, MOST),
    "rollout.batch_size": (1, MOST), "rollout.segment": (1, MOST),
    "evaluation.problems": (1, MOST), "evaluation.samples": (1, MOST), "evaluation.samples_between": (1, MOST),
    "evaluation.every": (0, MOST), "problems": (1, MOST), "samples": (1, MOST), "show": (0, MOST),
    "log_every": (1, MOST), "save_every": (1, MOST), "keep": (1, MOST),
    "max_bad_steps": (1, MOST), "distributed_timeout": (LEAST, MOST),
    "countdown_problems": (1, MOST), "countdown.numbers": (2, 6), "countdown.largest": (1, MOST),
    "toy.hidden": (1, MOST), "toy.layers": (1, MOST), "toy.heads": (1, MOST), "toy.intermediate": (1, MOST),
    "toy.updates": (1, MOST), "toy.batch": (1, MOST), "toy.lr": (LEAST, MOST), "toy.seed": (0, MOST),
}
WORDS = {
    "grpo.normaliser": ("token", "sequence"), "selection.normaliser": ("selected", "tokens"),
    "optimizer.schedule": ("cosine", "constant"), "precision": ("auto", "fp32", "bf16"),
}
FIELDS = {"prompt.countdown": ("numbers", "target"), "prompt.math": ("problem",), "prompt.plain": ("problem",)}


def check(keys: dict) -> None:
    """Refuses what cannot work, key by key, before anything is loaded or written."""
    for key in filter(keys.__contains__, RANGES):
        value, (low, high) = keys[key], RANGES[key]
        number = isinstance(value, (int, float)) and math.isfinite(value)
        limits = f"at least {low}" + (f" and at most {high}" if high < MOST else "")
        require(number and low <= value <= high, f"{key}={value}: give a number of {limits}")
    for key in filter(keys.__contains__, WORDS):
        require(keys[key] in WORDS[key], f"{key}={keys[key]}: give one of {', '.join(WORDS[key])}")
    for key, fields in FIELDS.items():
        for field in fields:
            require(f"{{{field}}}" in keys[key], f"{key}={keys[key]!r}: it must contain {{{field}}}")
    require(keys["temperature"] > 0 or keys.get("samples") == 1,
            f"temperature={keys['temperature']}: 0 is greedy, for evaluate.py with samples=1")
    limit, heads = keys["countdown.limit"], keys["toy.heads"]
    require(limit >= keys["countdown.largest"],
            f"countdown.limit={limit}: give at least countdown.largest={keys['countdown.largest']}")
    for kind in filter(None, keys["toy.also"].split(",")):
        require(re.fullmatch(r"[1-9]\d*x[1-9]\d*", kind) and int(kind.split("x")[1]) <= limit,
                f"toy.also={keys['toy.also']}: give kinds like 3x20,5x20, with numbers up to countdown.limit={limit}")
    require(heads == 1 or heads % 2 == 0, f"toy.heads={heads}: give an even number, or 1")
    require(keys["toy.hidden"] % (2 * heads) == 0, f"toy.hidden={keys['toy.hidden']}: give a multiple of {2 * heads}")
    if "steps" in keys:
        check_step(keys)
    if "model" in keys:
        check_model(keys["model"])
    for key, wanted, package in (("reward.grader", keys["reward.grader"].startswith("math_verify"), "math-verify"),
                                 ("log.wandb", keys.get("log.wandb"), "wandb"),
                                 ("log.tensorboard", keys.get("log.tensorboard"), "tensorboard")):
        require(not wanted or importlib.util.find_spec(package.replace("-", "_")) is not None,
                f"{key}={keys.get(key)}: pip install {package}; that library is not here")


def record_of(key: str, name: str, records: dict):
    """The record of that name."""
    require(name in records, f"{key}={name}: give one of {', '.join(records)}")
    return records[name]


def hub_dataset(source: str) -> tuple[str, str | None, str] | None:
    """(name, config, split) of owner/name@split or owner/name:config@split; None if it is not like that."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?@([\w.-]+)", source)
    return found and found.groups()


def check_step(keys: dict) -> None:
    require(keys["name"] not in ("", ".", "..") and Path(keys["name"]).name == keys["name"],
            f"name={keys['name']}: give one plain folder name")
    ranks, updates = int(os.environ.get("WORLD_SIZE", "1")), keys["grpo.updates_per_rollout"]
    require(keys["prompts_per_step"] % (ranks * updates) == 0,
            f"prompts_per_step={keys['prompts_per_step']}: give a multiple of {ranks * updates}, "
            f"{ranks} ranks x {updates} updates per rollout")


def check_model(model: str) -> None:
    """A local folder must hold a model; what cannot be a hub name must be a local folder."""
    if model == "toy":
        return
    if Path(model).exists():
        for file in ("config.json", "tokenizer.json"):
            require((Path(model) / file).is_file(), f"model={model}: the folder holds no {file}")
    else:
        owner, _, rest = model.partition("/")
        hub = owner.strip(".~") and rest and "/" not in rest and not Path(owner).is_dir()
        require(hub, f"model={model}: no such folder; give toy, a local HF folder, or a hub name (owner/name)")
