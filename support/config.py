"""Loads settings from config.yaml, a recipe and key=value arguments; reports errors in one line."""

import difflib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

DEFAULTS = Path(__file__).parents[1] / "config.yaml"

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Reports a mistake of the user in one line that names it and says what to do."""

    exit_code = 2


class RunError(UserError):
    """Ends a run whose settings are valid, for example because the loss is not finite."""

    exit_code = 1


# The functions of a run in which memory can run out, and the settings that change what they need.
MEMORY_HINTS = {
    "sample": "sampling: lower rollout.batch_size",
    "rescore": "rescoring: lower micro_batch_tokens, micro_batch_size or logits_chunk",
    "select": "the selection: start a new run with a lower prompts_per_step or group_size",
    "update": "the update: lower micro_batch_tokens, micro_batch_size or logits_chunk, or give "
    "gradient_checkpointing=true or offload=true",
    "save": "saving a checkpoint: give offload=true or more ranks",
    "set_up": "loading: give offload=true, more ranks or a smaller model",
}


def out_of_memory(error: Exception) -> str:
    """Return one line that names where memory ran out; "" if the error is another one."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # as CUDA, the CPU's allocator and cuBLAS say it
    phrases = "out of memory|can't allocate|not enough memory|alloc_failed"
    if isinstance(error, RuntimeError) and re.search(phrases, str(error), re.IGNORECASE):
        known = True
    if not known:
        return ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.name in MEMORY_HINTS:
            return f"out of memory in {MEMORY_HINTS[frame.name]}"
    return "out of memory"


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def lookup(key: str, name: str, records: dict):
    """Return records[name], or raise a UserError that lists the names."""
    require(name in records, f"{key}={name}: give one of {', '.join(records)}")
    return records[name]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr when the user made a mistake or memory ran out."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # with torchrun all ranks make the same mistake
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (RuntimeError, MemoryError) as error:
        line = out_of_memory(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(RunError.exit_code)
    except OSError as error:  # such as a full disk, or a folder that may not be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(RunError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------- loading


def load_config(arguments: list[str], defaults: dict | None = None) -> SimpleNamespace:
    """Read config.yaml, lay a recipe over it and key=value arguments over both.

    `defaults` are keys that only this command has. Every value has the type of its default. With
    resume= and name= the settings of that run are laid over config.yaml first, so that a run is
    resumed without repeating its arguments. Returns nested attributes, such as config.optimizer.lr.
    Raises UserError.
    """
    flat = read_defaults() | (defaults or {})
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        require(bool(equals), f"argument {argument!r} is not key=value, as in optimizer.lr=1e-5")
        overrides[key] = text
    layers = []
    if overrides.get("name") and overrides.get("resume", "false") != "false":
        layers.append(read_run_config(Path("runs") / overrides["name"]))
    if overrides.get("recipe"):
        layers.append(read_recipe(overrides["recipe"]))
    for layer in [*layers, overrides]:
        for key, value in layer.items():
            require(key in flat, f"unknown key {key}: {suggest(key, flat)}")
            flat[key] = cast(key, value, flat[key])
    check(flat)
    return nest(flat)


def read_defaults() -> dict:
    """Read config.yaml as a flat dictionary, {"optimizer.lr": 0.0002, ...}."""
    return flatten(read_yaml(DEFAULTS))


def read_recipe(file: str) -> dict:
    """Read a recipe, a YAML file with some of the keys of config.yaml, as a flat dictionary."""
    require(Path(file).is_file(), f"recipe={file}: there is no such file; recipes/ has some")
    return flatten(read_yaml(Path(file)))


def read_run_config(folder: Path) -> dict:
    """Read the settings of an earlier run; {} if there is none.

    Keys that no longer exist are left out.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    known = read_defaults()
    return {key: value for key, value in flatten(read_yaml(file)).items() if key in known}


def read_yaml(file: Path) -> dict:
    """Read a YAML file of settings, or raise UserError."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from None
    require(
        isinstance(tree, dict),
        f"{file} holds no settings: give a YAML file with keys as in config.yaml",
    )
    return tree


def flatten(tree: dict | SimpleNamespace, prefix: str = "") -> dict:
    """Turn nested settings into one flat dictionary whose keys have dots."""
    if isinstance(tree, SimpleNamespace):
        tree = vars(tree)
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict | SimpleNamespace):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: dict) -> SimpleNamespace:
    """Turn a flat dictionary whose keys have dots into nested attributes."""
    config = SimpleNamespace(**to_tree(flat))
    for name, value in vars(config).items():
        if isinstance(value, dict):
            setattr(config, name, nest(value))
    return config


def to_yaml(flat: dict) -> str:
    """Write flat settings as the nested YAML that read_yaml reads."""
    return yaml.safe_dump(to_tree(flat), sort_keys=False, allow_unicode=True, width=1000)


def to_tree(flat: dict) -> dict:
    """Turn a flat dictionary whose keys have dots into nested dictionaries."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree


def cast(key: str, value, default):
    """Convert a value to the type of its default, or raise UserError.

    The text "1e-6" becomes a number and "true" a bool.
    """
    if key == "resume" and value == "auto":
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(default, int) and not isinstance(value, bool):
            number = float(value)
            if number.is_integer():  # 1e3 is a whole number too
                return int(number)
        if isinstance(default, float) and not isinstance(value, bool):
            return float(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    if isinstance(default, str) and (value is None or isinstance(value, str)):
        return value or ""
    kind = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in quotes)",
    }[type(default)]
    raise UserError(f"{key}={value}: give {kind}, such as {default!r}")


def suggest(key: str, known: dict) -> str:
    """Return a hint for a misspelled key."""
    same_name = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if close:
        return f"did you mean {' or '.join(close)}?"
    members = [other for other in known if other.startswith(f"{key.split('.')[0]}.")]
    return f"the keys are {', '.join(members) or 'those of config.yaml'}"


def split_list(text: str) -> list[str]:
    """Split `a,b` or `[a,b]` into its items."""
    items = [item.strip() for item in text.strip("[]").split(",")]
    require(all(items), f"{text}: give a word, or several as [a,b]")
    return items


def show_help(arguments: list[str], doc: str, defaults: dict | None = None) -> None:
    """Print a command's docstring and every setting, and exit, if --help is among the arguments."""
    if not {"-h", "--help"} & set(arguments):
        return
    print(doc.strip())
    if defaults:
        print(f"\nThis command's own settings:\n\n{to_yaml(defaults)}", end="")
    print(f"\nAll settings:\n\n{DEFAULTS.read_text(encoding='utf-8')}", end="")
    sys.exit(0)


# ---------------------------------------------------------------- checking

# The smallest and the largest value of each number; SHARES are between 0 and 1.
SMALLEST = {
    "show": 0,
    "problems": 1,
    "samples": 1,
    "countdown.numbers": 2,
    "group_size": 2,  # a group of one has no spread to normalise by
    "toy.hidden": 8,
}
AT_LEAST_0 = (
    "seed evaluation.seed toy.seed temperature grpo.clip_low grpo.clip_high selection.kl_coef "
    "optimizer.lr optimizer.weight_decay micro_batch_tokens evaluation.every"
)
AT_LEAST_1 = (
    "steps prompts_per_step updates_per_rollout max_new_tokens micro_batch_size logits_chunk "
    "rollout.batch_size rollout.segment evaluation.problems evaluation.samples "
    "evaluation.samples_between log_every save_every keep max_bad_steps countdown_problems "
    "countdown.largest countdown.limit toy.layers toy.updates toy.batch"
)
SMALLEST |= dict.fromkeys(AT_LEAST_0.split(), 0) | dict.fromkeys(AT_LEAST_1.split(), 1)
ABOVE_0 = ("forking_fraction", "optimizer.max_grad_norm", "distributed_timeout")
SHARES = ("validation_fraction", "selection.fraction", "forking_fraction", "optimizer.warmup")
LARGEST = {"seed": 2**31 - 1, "evaluation.seed": 2**31 - 1, "countdown.numbers": 6}
LARGEST |= dict.fromkeys(SHARES, 1)
CHOICES = {
    "precision": ("auto", "fp32", "bf16"),
    "grpo.normaliser": ("token", "sequence"),
    "optimizer.schedule": ("cosine", "constant"),
    "prompt.chat": ("auto", "never"),
}


def check(flat: dict) -> None:
    """Raise UserError if a setting is out of range or does not fit another setting."""
    for key, value in flat.items():
        if key in SMALLEST:
            require(value >= SMALLEST[key], f"{key}={value}: give at least {SMALLEST[key]}")
        if key in SHARES:
            require(value >= 0, f"{key}={value}: give at least 0")
        if key in ABOVE_0:
            require(value > 0, f"{key}={value}: give more than 0")
        if key in LARGEST:
            require(value <= LARGEST[key], f"{key}={value}: give at most {LARGEST[key]}")
        if isinstance(value, float):
            require(math.isfinite(value), f"{key}={value}: give a number")
    for key, choices in CHOICES.items():
        require(flat[key] in choices, f"{key}={flat[key]}: give {' or '.join(choices)}")
    greedy = "is greedy decoding, which only evaluate.py does, with samples=1"
    require(flat["temperature"] > 0 or flat.get("samples") == 1, f"temperature=0 {greedy}")
    require(flat["forking_fraction"] < 1, "forking_fraction=1: give a share of the tokens below 1")
    limit, largest = flat["countdown.limit"], flat["countdown.largest"]
    require(limit >= largest, f"countdown.limit={limit}: give at least countdown.largest={largest}")
    name = flat["name"]
    plain = name not in ("", ".", "..") and Path(name).name == name and len(name.encode()) <= 200
    require(plain, f"name={name}: give a plain folder name of at most 200 bytes, for runs/<name>/")
    fields = {"countdown": ("numbers", "target"), "math": ("problem",), "plain": ("problem",)}
    for key, names in fields.items():
        for field in names:
            template = flat[f"prompt.{key}"]
            require(
                f"{{{field}}}" in template,
                f"prompt.{key}={template!r}: it must contain {{{field}}}",
            )
