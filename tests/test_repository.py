"""Facts about the repository: what imports what, that every key is read, and that the README tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import config
import grpo
import rewards
import scope

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in ROOT.glob("*.py"))
OURS = {path.stem for path in FILES}
RUNTIME = {"torch", "transformers", "tokenizers", "numpy", "tqdm", "yaml", "huggingface_hub"}  # transformers' own last
OPTIONAL = {"matplotlib", "math_verify"}  # imported in the branch that was asked for

# file: the files of ours that it may import. Dependencies point one way only.
MAY_IMPORT = {
    "scope": set(),
    "grpo": set(),
    "latex": set(),
    "verify": set(),
    "rewards": {"latex", "verify"},
    "config": set(),
    "distributed": set(),
    "rollout": {"config"},
    "data": {"config", "rewards"},
    "toy": {"data", "distributed", "rollout"},
    "plots": {"config"},
    "evaluate": {"config", "data", "distributed", "plots", "rollout", "step", "toy"},
    "dry_run": {"config", "rollout", "step", "toy"},
    "grading": {"config", "data", "evaluate", "rewards"},
    "analyze": OURS - {"analyze", "benchmark", "dry_run", "grading"},
    "checkpoint": {"config", "distributed", "rollout"},
    "step": {"config", "data", "distributed", "grpo", "rewards", "rollout", "scope"},
    "train": OURS - {"train", "benchmark", "analyze", "grading"},
    "benchmark": OURS - {"benchmark", "grading"},
}
ALSO = {"scope": {"torch"}, "grpo": {"torch"}, "rewards": {"torch"}, "config": {"yaml"}, "latex": set(),
        "verify": {"math_verify"}}  # outside packages, if limited  # fmt: skip


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_imports_point_one_way():
    assert MAY_IMPORT.keys() == OURS
    for path in FILES:
        found = imports(path)
        assert found & OURS <= MAY_IMPORT[path.stem], path.name
        outside = found - OURS - set(sys.stdlib_module_names)
        assert outside <= ALSO.get(path.stem, RUNTIME | OPTIONAL), path.name


def test_every_config_key_is_read():
    """As `config.a.b`, as **vars(config.a), or as the string "a.b" in code other than the checks."""
    code = "".join(path.read_text() for path in FILES if path.stem != "config")
    for key in config.read_defaults().keys() - {"recipe"}:  # that one is config.py's own
        group = key.rpartition(".")[0]
        read = re.search(rf"config\.{re.escape(key)}\b", code) or (group and f"vars(config.{group})" in code)
        assert read, f"{key} is read by nothing"


def readme_commands() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_readme_begins_with_the_two_commands():
    run, test = (block.strip() for block in readme_commands()[:2])
    assert "\n" not in run and "\n" not in test
    assert "-r requirements.txt" in run and run.endswith("torchrun train.py")
    assert "-r requirements.txt" in test and "-r requirements-dev.txt" in test and "pytest" in test


def test_readme_commands_parse():
    """Every train.py or evaluate.py line of the README has keys that exist, of the right type."""
    lines = [line for block in readme_commands() for line in block.splitlines()]
    commands = [line.partition("#")[0].split() for line in lines if re.search(r"(train|evaluate)\.py", line)]
    assert len(commands) >= 4
    for words in commands:
        script = next(i for i, word in enumerate(words) if re.search(r"(train|evaluate)\.py$", word))
        arguments = [word.strip("\"'") for word in words[script + 1 :] if "=" in word]
        defaults = config.evaluation_keys([]) if "evaluate" in words[script] else config.read_defaults()
        config.override(defaults, arguments)


def test_readme_rows_of_methods_run():
    """The config words in the tables: keys that exist, values of the right type, methods that are there."""
    known = {"reward.kind": rewards.REWARDS, "objective": grpo.OBJECTIVES, "selection.strategy": scope.STRATEGIES}
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    lines = [words for row in rows for words in re.findall(r"`([^`]*=[^`]*)`", row)]
    assert len(lines) > 20
    for words in lines:
        keys = config.override(config.read_defaults(), words.split())
        config.check(keys)
        assert all(keys[key] in names for key, names in known.items()), words


def test_readme_names_every_file_and_metric():
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        assert f"`{path.name}`" in readme, path.name


def test_requirements_are_exact_pins_of_six_packages():
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert set(pins) == {"torch", "transformers", "tokenizers", "numpy", "tqdm", "pyyaml"}
    assert all("==" in line for line in (ROOT / "requirements-dev.txt").read_text().split())


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)
