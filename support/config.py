"""Config: config.yaml's defaults, `key=value` overrides typed by them, and one line for every mistake.

Standard library and yaml only, so that a typo is reported before torch is imported.
"""

import difflib
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import yaml

from support import signals
from support.checks import UserError, check, check_file, check_model, listed, require

DEFAULTS = Path(__file__).parents[1] / "config.yaml"
SHORT = {"data": "data.file", "reward": "reward.kind"}


class Loader(yaml.SafeLoader):
    """YAML of plain settings: 1e-6 is a number and 010 none, as in version 1.2; no dates; nothing twice, no key of
    a mapping and none by reference, for ten lines of references can stand for a billion words."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        (key, count), *_ = Counter(str(key.value) for key, _ in node.value).most_common(1) or [("", 0)]
        if count > 1:
            raise yaml.YAMLError(f"{key} stands twice, in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":int"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][\d_]{,30})$"), list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"),
                             list("-+0123456789"))


class Dumper(yaml.SafeDumper):
    """Quotes a text, such as 1e-6, that YAML 1.1 or `Loader` would read as something else."""


Dumper.yaml_implicit_resolvers = {
    first: known + Loader.yaml_implicit_resolvers[first]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def write_yaml(tree: dict) -> str:
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def read_yaml(text: str):
    """As safe as safe_load. Whatever is wrong with the text is a YAMLError."""
    if len(text) > 100_000:
        raise yaml.YAMLError("it is longer than any settings are")
    try:
        return yaml.load(text, Loader)
    except (ValueError, RecursionError, TypeError) as error:  # !!int x; a thousand brackets; a list as a key
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


@contextmanager
def one_line_errors():
    """Turns a UserError into its message on stderr (once, from rank 0) and its exit code; a signal into a line too."""
    signals.listen()
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            signals.report(f"error: {error}")
        else:
            time.sleep(2)  # torchrun ends all ranks with the first: let rank 0 speak
        sys.exit(error.status)


def print_notes(notes: list[str]) -> None:
    """On stderr, once, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


def read_defaults() -> dict:
    """config.yaml as a flat dictionary, `{"optimizer.lr": 3e-05, ...}`."""
    return flatten(read_yaml(DEFAULTS.read_text(encoding="utf-8")))


def flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nest(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree


def override(defaults: dict, arguments: list[str]) -> dict:
    """The flat defaults with `key=value` arguments put in, each of its default's type."""
    flat = dict(defaults)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"argument {argument!r} is not key=value; for example optimizer.lr=1.0e-5")
        key = SHORT.get(key, key)
        group = [name for name in defaults if name.startswith(key + ".")]
        require(not group, f"{argument}: {key} is a group; its keys are {', '.join(group)}")
        require(key in defaults, f"unknown config key {key!r}: {closest(key, defaults)}")
        try:
            value = text if isinstance(defaults[key], str) and text not in ("null", "~") else read_yaml(text)
        except yaml.YAMLError:
            value = text
        flat[key] = typed(key, value, defaults[key], shown=text)
    return flat


def typed(key: str, value, default, shown: str):
    """`value`, if it has the default's type."""
    if type(value) is int and type(default) is float:
        value = float(value)
    if type(value) is float and type(default) is int and value.is_integer():
        value = int(value)  # 1e3
    if value is None and type(default) is str:
        value = ""
    needed = " or ".join([NAMES[type(default)], *(words := WORDS.get(key, []))])
    require(type(value) is type(default) or value in words, f"{key}={shown}: needs {needed}; write it like {default!r}")
    return value


def recipe_keys(arguments: list[str], known: dict) -> dict:
    """The flat keys of the last `recipe=` among the arguments, each of its default's type; none without one."""
    file = ([word.removeprefix("recipe=") for word in arguments if word.startswith("recipe=")] or [""])[-1]
    if not file:
        return {}
    require(Path(file).is_file(), f"recipe={file}: no such file; recipes/ has some")
    try:
        tree = read_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe={file} cannot be read: {' '.join(str(error).split())[:300]}") from None
    require(isinstance(tree, dict), f"recipe={file}: give a YAML file of keys as in config.yaml")
    flat = {SHORT.get(key, key): value for key, value in flatten(tree).items()}
    for key in flat:
        require(key in known, f"recipe={file}: unknown config key {key!r}: {closest(key, known)}")
    try:
        return {key: typed(key, value, known[key], shown=str(value)) for key, value in flat.items()}
    except UserError as error:
        raise UserError(f"recipe={file}: {error}") from None


WORDS = {"resume": ["auto"]}  # that a key takes besides values of its default's type
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def closest(key: str, keys) -> str:
    """The key that is meant, or those of the same name or group, or every group: a hint that fits on one line."""
    group, _, name = key.rpartition(".")
    near = [k for k in keys if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
    if near:
        return f"did you mean {' or '.join(near)}?"
    near = [k for k in keys if group and k.startswith(group + ".")]
    return "the keys are " + ", ".join(near or sorted({k.partition(".")[0] for k in keys}))


def namespace(tree: dict) -> SimpleNamespace:
    """Nested dictionaries as attributes: config.optimizer.lr."""
    return SimpleNamespace(**{k: namespace(v) if isinstance(v, dict) else v for k, v in tree.items()})


def own_words(arguments: list[str], own: dict) -> tuple[dict, list[str]]:
    """A command's own keys, and the words that it hands on to train.py, checked as train.py would."""
    mine = [word for word in arguments if word.partition("=")[0] in own]
    rest = [word for word in arguments if word not in mine]
    settings = override(own, mine)
    for key, value in settings.items():
        require(not isinstance(value, int) or value >= min(own[key], 1), f"{key}={value}: give at least {own[key]}")
    training_keys(rest)
    return settings, rest


def training_keys(arguments: list[str]) -> dict:
    """The flat, checked config of train.py: config.yaml, a recipe laid over it, and `key=value` arguments."""
    defaults = read_defaults()
    keys = override(defaults | stored_keys(arguments, defaults) | recipe_keys(arguments, defaults), arguments)
    check(keys)
    return keys


def stored_keys(arguments: list[str], known: dict) -> dict:
    """With resume=true or auto, name=NAME: that run's own settings; none where there is no such run."""
    words = [word for word in arguments if word.startswith(("name=", "resume="))]
    asked = override({"name": "", "resume": False}, words)
    stored = Path("runs") / asked["name"] / "config.yaml"
    there = asked["name"] and asked["resume"] and os.path.isfile(stored)
    return {key: value for key, value in read_stored(stored).items() if key in known} if there else {}


def read_stored(file: Path) -> dict:
    """The flat keys of a run's config.yaml."""
    try:
        return flatten(read_yaml(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # AttributeError: no keys in it
        raise UserError(f"{file} is damaged: it holds no settings; put it back, or delete the run") from None


def evaluation_keys(arguments: list[str]) -> dict:
    """The flat, checked config of evaluate.py: the keys of config.yaml or a recipe that matter there, and its own."""
    defaults = read_defaults()
    defaults |= recipe_keys(arguments, defaults)
    kept = ("recipe", "model", "data.problem_field", "data.answer_field", "prompt.", "reward.grader", "seed",
            "max_new_tokens", "temperature", "precision", "micro_batch", "logits_chunk", "rollout.", "countdown.",
            "toy.", "benchmarks.")
    keys = {key: value for key, value in defaults.items() if key.startswith(kept)}
    keys |= {"data.file": defaults["evaluation.data"], "problems": defaults["evaluation.problems"], "samples": 16,
             "k": "auto", "show": 0, "out": "auto"}
    keys = override(keys, [a.replace("models=", "model=", 1) if a.startswith("models=") else a for a in arguments])
    check({key: value for key, value in keys.items() if key not in ("model", "data.file")})
    for model in listed(keys["model"]):
        check_model(model)
    for file in listed(keys["data.file"]):
        check_file("data", file, keys)
        require(file != "auto" or defaults["data.file"] == "countdown",
                f"recipe={keys['recipe']} evaluates on a share of its training file: give data=FILE")
    ks(keys["k"], keys["samples"])
    require(keys["out"] not in ("", ".", "..") and Path(keys["out"]).name == keys["out"],
            f"out={keys['out']}: give one plain name; the results go to evaluations/<out>.json")
    return keys


def trained_otherwise(model: str, prompt: dict) -> list[str]:
    """A note on each prompt that the run this model comes from had, and that is not the one given here."""
    folder = Path(model).parent  # of runs/NAME/model or runs/NAME/checkpoints/step-NNNNNN
    stored = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    if not stored.is_file():
        return []
    keys = read_stored(stored)
    return [f"{model} was trained with prompt.{name}={keys[f'prompt.{name}']} and is asked otherwise here: "
            f"recipe={stored} brings its prompts" for name in prompt
            if keys.get(f"prompt.{name}", prompt[name]) != prompt[name]]


def ks(text: str, samples: int) -> list[int]:
    """The k of Pass@k: auto, the powers of two below the number of samples; or a list like [1,8,64]."""
    if text == "auto":
        return [k for k in (2**i for i in range(20)) if k < max(samples, 2)]
    words = listed(text)
    require(all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words), f"k={text}: give whole numbers, [1,8,64]")
    values = sorted({int(word) for word in words})
    require(values[-1] <= samples, f"k={values[-1]} with samples={samples}: Pass@k needs at least k samples")
    return values
