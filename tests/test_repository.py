"""Facts about the repository: what imports what, that every key is read, and that README and docs/ tell the truth."""

import ast
import re
import subprocess
import sys

from helpers import ROOT

import grpo
import rewards
import scope
from reproduce import OWN
from support import config

ROOMS = ("grading", "support", "analysis")
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNTIME = {"torch", "transformers", "tokenizers", "numpy", "tqdm", "yaml", "huggingface_hub"}  # transformers' own last
OPTIONAL = {"matplotlib", "math_verify", "trl", "datasets", "pyarrow", "wandb"}  # imported in the branch asked for

# Each file or room imports only what stands below it; within a room, and on one line, anything goes.
LEVELS = [
    {"analysis", "benchmark", "reproduce"},
    {"train"},
    {"evaluate", "metrics"},
    {"completions"},
    {"step"},
    {"toy"},
    {"data", "micro_batches"},
    {"rollout", "rewards"},
    {"grpo"},
    {"scope", "grading"},
    {"support"},
]
# Outside packages, where a reader should need few.
ONLY = {"scope": {"torch"}, "grpo": {"torch"}, "rewards": {"torch"}, "grading": {"tqdm", "math_verify"},
        "support/config": {"yaml"}, "support/checks": set(), "analysis/law": {"numpy"}}


def name_of(path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def imports(path) -> set[str]:
    """Whole dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_down_only():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    assert level.keys() == {name_of(path).partition("/")[0] for path in FILES}
    for path in FILES:
        own = name_of(path).partition("/")[0]
        found = {name.partition(".")[0] for name in imports(path)}
        for other in (found & level.keys()) - {own}:
            assert level[own] < level[other] or {own, other} <= LEVELS[level[own]], f"{name_of(path)} imports {other}"
        outside = found - level.keys() - set(sys.stdlib_module_names)
        allowed = ONLY.get(name_of(path), ONLY.get(own, RUNTIME | OPTIONAL))
        assert outside <= allowed, f"{name_of(path)} imports {outside - allowed}"


def test_rooms_have_no_circles():
    """Within a room too: some order of its files imports backwards only."""
    for room in ROOMS:
        left = {path.stem: path for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}
        while left:
            free = [stem for stem, path in left.items()
                    if not any(re.match(rf"{room}\.{other}\b", name) for name in imports(path) for other in left)]
            assert free, f"{room}: {', '.join(left)} import each other"
            left = {stem: path for stem, path in left.items() if stem not in free}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_methods_are_known_by_name_in_their_own_file_alone():
    """The rest of the code asks their records; config.py and config.yaml have only the defaults and the keys."""
    own = {"grpo": grpo.OBJECTIVES, "scope": scope.STRATEGIES, "rewards": rewards.REWARDS}
    compared = r"(?:==|!=|\bin\b)\s*\(?"
    for path in [path for path in FILES if path.parent.name != "analysis"]:  # which looks at certain ones
        for home, known in own.items():
            names = "|".join(known)
            if name_of(path) != home:
                assert not re.search(rf'{compared}"(?:{names})"', path.read_text()), f"{name_of(path)} knows {home}'s"


def test_every_config_key_is_read():
    """As `config.a.b`, as **vars(config.a), or as the string "a.b", in code other than the checks."""
    code = "".join(path.read_text() for path in FILES if path.stem != "config")
    for key in config.read_defaults().keys() - {"recipe"}:  # that one is config.py's own
        group = key.rpartition(".")[0]
        read = re.search(rf"config\.{re.escape(key)}\b", code) or f'"{key}"' in code
        assert read or (group and f"vars(config.{group})" in code), f"{key} is read by nothing"


# ---------------------------------------------------------------- README and docs/


def commands(pages=PAGES) -> list[str]:
    return [block for page in pages
            for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)]


def test_readme_begins_with_the_two_commands():
    run, test = (block.strip() for block in commands(PAGES[:1])[:2])
    assert "\n" not in run and "\n" not in test
    assert "-r requirements.txt" in run and run.endswith("python train.py")
    assert "-r requirements.txt" in test and "-r requirements-dev.txt" in test and "pytest" in test


def test_commands_parse():
    """Every line of README and docs/ that starts train.py or evaluate.py has keys that exist, of the right type."""
    lines = [line for block in commands() for line in block.splitlines()]
    lines += [code for page in PAGES for code in re.findall(r"`(python [^`]*)`", page.read_text().replace("\n", " "))]
    scripts = r"(train|evaluate|benchmark|reproduce)\.py"
    found = [line.partition("#")[0].split() for line in lines if re.search(scripts, line)]
    assert len(found) >= 15
    for words in found:
        script = next(i for i, word in enumerate(words) if re.search(f"{scripts}$", word))
        arguments = [word.strip("\"';") for word in words[script + 1 :] if "=" in word and "$" not in word]
        defaults = config.evaluation_keys([]) if "evaluate" in words[script] else config.read_defaults()
        defaults |= OWN if "reproduce" in words[script] else {}
        config.override(defaults, arguments)


def test_commands_of_modules_are_there():
    text = "".join(page.read_text() for page in PAGES)
    modules = set(re.findall(r"python -m ((?:analysis|grading)\.\w+)", text))
    assert {"analysis.law", "analysis.tightness", "analysis.tokens", "grading.measure"} <= modules
    for module in modules:
        assert 'if __name__ == "__main__":' in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_rows_of_methods_run():
    """The config words in the tables: keys that exist, values of the right type, methods that are there."""
    known = {"reward.kind": rewards.REWARDS, "objective": grpo.OBJECTIVES, "selection.strategy": scope.STRATEGIES}
    rows = [line for page in ("methods", "results") for line in (ROOT / f"docs/{page}.md").read_text().splitlines()]
    lines = [words for row in rows if row.startswith("| ") for words in re.findall(r"`(?!python )([^`]*=[^`]*)`", row)]
    assert len(lines) > 20
    for words in lines:
        keys = config.override(config.read_defaults(), words.split())
        config.check(keys)
        assert all(keys[key] in names for key, names in known.items()), words
    text = "\n".join(rows)
    for key, names in known.items():
        short = key.removesuffix(".kind")
        usual = config.read_defaults()[key]
        assert all(f"{short}={name}" in text or name == usual for name in names), key


def test_functions_that_the_pages_name_are_there():
    names = {name for page in PAGES for name in re.findall(r"`((?:scope|grpo|rollout|rewards|step|data)\.(?!py`)\w+)`",
                                                           page.read_text())}
    assert len(names) > 20
    for name in names - {"rollout.batch_size", "rollout.segment", *config.read_defaults()}:
        file, _, function = name.partition(".")
        assert re.search(rf"^(?:def|class) {function}\b|^{function} =", (ROOT / f"{file}.py").read_text(), re.M), name


def test_pages_name_every_file_and_links_lead_somewhere():
    readme = PAGES[0].read_text()
    for path in FILES:
        assert path.stem == "__init__" or f"`{path.name}`" in readme, path.name
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
        for file in re.findall(r"`((?:tests|docs|recipes|support|grading|analysis)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"


def test_tests_have_the_rooms_of_the_code():
    assert {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} == set(ROOMS)


def test_requirements_are_exact_pins_of_six_packages():
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert set(pins) == {"torch", "transformers", "tokenizers", "numpy", "tqdm", "pyyaml"}
    assert all("==" in line for line in (ROOT / "requirements-dev.txt").read_text().split())


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)
