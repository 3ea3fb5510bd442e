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


def check(keys: dict) -> None:
    """Refuses what cannot work, key by key, before anything is loaded or written."""

    def bound(key, low, high=float("inf"), *, above=False):
        if key not in keys:
            return
        require(type(keys[key]) in (int, float), f"{key}={keys[key]!r} in config.yaml is not a number")
        fits = math.isfinite(keys[key]) and (low < keys[key] if above else low <= keys[key]) and keys[key] <= high
        limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if math.isfinite(high) else "")
        require(fits, f"{key}={keys[key]}: give a number {limits}")

    for key in ("steps", "prompts_per_step", "max_new_tokens", "micro_batch_size", "logits_chunk", "log_every", "keep",
                "save_every", "rollout.batch_size", "rollout.segment", "evaluation.problems", "evaluation.samples",
                "evaluation.samples_between", "problems", "samples", "countdown_problems", "countdown.largest",
                "grpo.updates_per_rollout", "max_bad_steps",
                "toy.layers", "toy.hidden", "toy.heads", "toy.intermediate", "toy.updates", "toy.batch"):
        bound(key, 1)
    bound("seed", 0, 2**31 - 1)
    for key in ("grpo.clip_low", "grpo.clip_high", "grpo.kl_coef", "grpo.entropy_coef", "selection.kl_coef", "div.coef",
                "kl_cov.coef", "clip_cov.low", "optimizer.lr", "optimizer.weight_decay", "evaluation.every",
                "micro_batch_tokens", "show", "toy.seed"):
        bound(key, 0)
    bound("temperature", 0, above="samples" not in keys)  # evaluate.py has that key
    require(keys["temperature"] > 0 or keys.get("samples") == 1, "temperature=0 is greedy: give samples=1")
    for key in ("grpo.advantage_eps", "optimizer.max_grad_norm", "toy.lr", "distributed_timeout"):
        bound(key, 0, above=True)
    for key in ("selection.fraction", "kl_cov.fraction", "clip_cov.fraction", "data.validation"):
        bound(key, 0, 1)
    bound("optimizer.warmup", 0, 1)
    bound("countdown.numbers", 2, 6)
    require(keys["countdown.limit"] >= keys["countdown.largest"],
            f"countdown.limit={keys['countdown.limit']}: give at least countdown.largest={keys['countdown.largest']}")
    if "toy.also" in keys:
        for kind in filter(None, keys["toy.also"].split(",")):
            require(re.fullmatch(r"[1-9]\d*x[1-9]\d*", kind) and int(kind.split("x")[1]) <= keys["countdown.limit"],
                    f"toy.also={keys['toy.also']}: give kinds of problems like 3x20,5x20: so many numbers, the largest "
                    f"at most countdown.limit={keys['countdown.limit']}")
    heads = keys["toy.heads"]
    require(heads == 1 or heads % 2 == 0, f"toy.heads={heads}: give an even number, or 1")
    require(keys["toy.hidden"] % (2 * heads) == 0,
            f"toy.hidden={keys['toy.hidden']}: give a multiple of {2 * heads}, twice toy.heads")
    if "steps" in keys:
        check_step(keys)
    for key, fields in (("countdown", ("numbers", "target")), ("math", ("problem",)), ("plain", ("problem",))):
        for field in fields:
            template = keys[f"prompt.{key}"]
            require(f"{{{field}}}" in template, f"prompt.{key}={template!r}: it must contain {{{field}}}")
    if "model" in keys:
        check_model(keys["model"])
    if keys.get("data.file", "countdown") != "countdown":
        check_file("data", keys["data.file"], {})
    else:
        require(not keys.get("data.filter"), f"data.filter={keys.get('data.filter')}: only rows of a data=FILE have "
                                             "levels and subjects")
    for file in listed(keys.get("evaluation.data", "auto")):
        check_file("evaluation.data", file, keys)
    require(keys.get("precision", "auto") in ("auto", "fp32", "bf16"),
            f"precision={keys.get('precision')}: give auto, fp32 or bf16")
    require(keys["reward.grader"] in ("exact", "math_verify"),
            f"reward.grader={keys['reward.grader']}: give exact or math_verify")
    for wanted, package, mend in (
            (keys["reward.grader"] != "exact", "math_verify",
             f"reward.grader={keys['reward.grader']}: pip install math-verify"),
            (keys.get("log.wandb"), "wandb", f"log.wandb={keys.get('log.wandb')}: pip install wandb"),
            (keys.get("log.tensorboard"), "tensorboard", "log.tensorboard=true: pip install tensorboard")):
        require(not wanted or importlib.util.find_spec(package) is not None,
                f"{mend}, or leave the word out; that library is not here")


def is_remote(file: str) -> bool:
    return file.startswith(("hf://", "https://", "http://"))


def hub_dataset(source: str) -> tuple[str, str | None, str] | None:
    """(name, config, split) of owner/name@split or owner/name:config@split; None if it is not like that."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?@([\w.-]+)", source)
    return found and found.groups()


def check_file(key: str, file: str, keys: dict) -> None:
    """A local file must exist; what is on the hub or the web is looked for when it is read."""
    file = keys.get(f"benchmarks.{file}", file)
    if file == "auto":
        return
    if is_remote(file) or Path(file).is_file():
        library = "pyarrow" * file.endswith(".parquet")
    else:
        library = "datasets"
        require(bool(hub_dataset(file)), f"{key}={file}: no such file; give one, or a data set of the hub as "
                                         "owner/name@split or owner/name:config@split")
    require(not library or importlib.util.find_spec(library) is not None,
            f"{key}={file}: pip install {library}, or give a JSONL file; that library is not here")


def check_step(keys: dict) -> None:
    require(keys["name"] not in ("", ".", "..") and Path(keys["name"]).name == keys["name"],
            f"name={keys['name']}: give one plain folder name; the run goes to runs/<name>/")
    require(keys["group_size"] >= 2, f"group_size={keys['group_size']}: give at least 2, for an advantage is a "
                                     "completion's distance from the others of its group")
    for key, words in (("grpo.normaliser", ("token", "sequence")), ("selection.kl", ("full", "k3")),
                       ("selection.normaliser", ("selected", "tokens")),
                       ("optimizer.schedule", ("cosine", "constant"))):
        require(keys[key] in words, f"{key}={keys[key]}: give {' or '.join(words)}")
    require(0 < keys["forking_fraction"] < 1,
            f"forking_fraction={keys['forking_fraction']}: give a share of the tokens above 0 and below 1")
    require(keys["clip_cov.low"] < keys["clip_cov.high"],
            f"clip_cov.low={keys['clip_cov.low']}: give less than clip_cov.high={keys['clip_cov.high']}")
    ranks, updates = int(os.environ.get("WORLD_SIZE", "1")), keys["grpo.updates_per_rollout"]
    require(keys["prompts_per_step"] % (ranks * updates) == 0,
            f"prompts_per_step={keys['prompts_per_step']} does not divide by the {ranks} ranks x {updates} updates per "
            f"rollout: give a multiple of {ranks * updates}")


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
