"""Facts about the repository: imports, settings that are read, pages that are true."""

import ast
import re
import subprocess
import sys

from helpers import ROOT

import evaluate
import objectives
import rewards
import scope
from paper.reproduce import SETTINGS
from support import config

SCRIPTS = "train evaluate toy data rewards rollout objectives scope grpo".split()
ROOMS = ("grading", "support", "paper")
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNTIME = {"torch", "transformers", "tokenizers", "numpy", "tqdm", "yaml"}
OPTIONAL = {"matplotlib", "math_verify", "trl", "datasets", "wandb"}  # in the branch asked for

# From the top to the bottom of the house: imports only go down.
LEVELS = ["paper", *SCRIPTS, "grading", "support"]


def name_of(path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def imports(path) -> set[str]:
    """Return the whole dotted names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_root_has_nine_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


def test_imports_only_go_down():
    level = {name: i for i, name in enumerate(LEVELS)}
    for path in FILES:
        home = name_of(path).partition("/")[0]
        for other in {name.partition(".")[0] for name in imports(path)} & level.keys() - {home}:
            assert level[home] < level[other], f"{name_of(path)} imports {other}"


def test_rooms_have_no_circles():
    """Within a room too, some order of its files imports backwards only."""
    for room in ROOMS:
        left = {path.stem: path for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}
        while left:
            free = []
            for stem, path in left.items():
                names = imports(path)
                if not any(re.match(rf"{room}\.{other}\b", n) for n in names for other in left):
                    free.append(stem)
            assert free, f"{room}: {', '.join(left)} import each other"
            left = {stem: path for stem, path in left.items() if stem not in free}


def test_the_program_needs_six_packages():
    for path in FILES:
        outside = {name.partition(".")[0] for name in imports(path)}
        outside -= {*LEVELS, *sys.stdlib_module_names}
        assert outside <= RUNTIME | OPTIONAL, f"{name_of(path)} imports {outside}"
    for name in ("scope", "grpo"):
        outside = {imported.partition(".")[0] for imported in imports(ROOT / f"{name}.py")}
        assert outside - set(sys.stdlib_module_names) == {"torch"}, name
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert set(pins) == RUNTIME - {"yaml"} | {"pyyaml"}
    assert all("==" in line for line in (ROOT / "requirements-dev.txt").read_text().split())


def test_every_setting_is_read():
    """As `config.a.b` or `a.b`, as **vars(config.a), or as the string "a.b"."""
    code = "".join(path.read_text() for path in FILES if path.stem != "config")
    for key in config.read_defaults().keys() - {"recipe"}:  # read in config.py itself
        group = key.rpartition(".")[0]
        read = re.search(rf"(?:config\.|\b){re.escape(key)}\b", code) or f'"{key}"' in code
        assert read or (group and f"vars(config.{group})" in code), f"nothing reads {key}"


def test_methods_are_known_by_name_in_their_own_file_only():
    """The rest of the code asks their records."""
    homes = {
        "objectives": objectives.OBJECTIVES,
        "scope": scope.STRATEGIES,
        "rewards": rewards.REWARDS,
    }
    compared = r"(?:==|!=|\bin\b)\s*\(?"
    for path in [path for path in FILES if path.parent.name != "paper"]:  # it looks at some of them
        for home, records in homes.items():
            if name_of(path) != home:
                names = "|".join(records)
                found = re.search(rf'{compared}"(?:{names})"', path.read_text())
                assert not found, f"{name_of(path)} knows a method of {home}"


# ---------------------------------------------------------------- README and docs/


def commands(pages=PAGES) -> list[str]:
    blocks = []
    for page in pages:
        blocks += re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return blocks


def test_the_first_two_blocks_of_the_readme_are_one_command_each():
    run, test = (block.strip() for block in commands(PAGES[:1])[:2])
    assert "\n" not in run + test
    assert "-r requirements.txt" in run
    assert run.endswith("python train.py")
    assert "-r requirements.txt -r requirements-dev.txt" in test
    assert test.endswith("python -m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()  # it runs the second block


def test_the_readme_names_every_script():
    readme = PAGES[0].read_text()
    for script in SCRIPTS:
        assert f"`{script}.py`" in readme, script


def test_commands_have_settings_that_exist():
    """In README and docs/: keys that exist, with values of the right type."""
    text = "\n".join(commands()).replace("\\\n", " ")
    lines = text.splitlines()
    for page in PAGES:
        lines += re.findall(r"`(python [^`]*)`", page.read_text().replace("\n", " "))
    program = r"(train\.py|evaluate\.py|paper\.reproduce)(?= |$)"
    known = config.read_defaults()
    count = 0
    for line in lines:
        found = re.search(program, line.partition("#")[0])
        if not found:
            continue
        count += 1
        defaults = known
        if found[1] == "evaluate.py":
            defaults = known | evaluate.SETTINGS
        elif found[1] == "paper.reproduce":
            defaults = known | SETTINGS
        for word in line[found.end() :].partition("#")[0].replace('"', "").split():
            key, equals, value = word.partition("=")
            if equals:
                assert key in defaults, f"{line}: {key}"
                config.cast(key, value, defaults[key])
    assert count >= 10


def test_commands_of_modules_are_there():
    text = "".join(page.read_text().replace("\n", " ") for page in PAGES)
    modules = set(re.findall(r"python -m (paper\.\w+)", text))
    assert {"paper.reproduce", "paper.mechanism", "paper.tokens", "paper.one_step"} <= modules
    for module in modules:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert 'if __name__ == "__main__":' in source


def test_settings_in_the_table_of_methods_exist():
    records = {
        "reward": rewards.REWARDS,
        "objective": objectives.OBJECTIVES,
        "selection.strategy": scope.STRATEGIES,
    }
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"`([\w.]+=[^`]*)`", text)
    assert len(rows) > 15
    for row in rows:
        for word in row.split():
            key, _, value = word.partition("=")
            if value:
                loaded = config.flatten(config.load_config([word]))
                assert key not in records or loaded[key] in records[key], word
    for key, names in records.items():
        usual = config.read_defaults()[key]
        assert all(f"{key}={name}" in text or name == usual for name in names), key


def test_functions_that_the_pages_name_are_there():
    pattern = r"`((?:scope|grpo|objectives|rollout|rewards|train|data|evaluate)\.(?!py`)\w+)`"
    names = {name for page in PAGES for name in re.findall(pattern, page.read_text())}
    assert len(names) > 15
    for name in names - config.read_defaults().keys():
        file, _, function = name.partition(".")
        source = (ROOT / f"{file}.py").read_text()
        assert re.search(rf"^(?:def|class) {function}\b|^{function} =", source, re.M), name


def test_links_and_paths_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for file in re.findall(
            r"`((?:tests|docs|recipes|support|grading|paper)/[\w./-]+\.\w+)`", text
        ):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"


def test_lint():
    """At most 100 columns, one statement a line, and the format of `ruff format`."""
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--no-cache", "."], cwd=ROOT, check=True)
    subprocess.run([*ruff, "format", "--no-cache", "--check", "."], cwd=ROOT, check=True)


def test_numbers_about_results_are_in_their_tables():
    """Measured numbers have three decimals, and shares of the mechanism one and a per cent sign."""
    tables = "\n".join(file.read_text() for file in sorted((ROOT / "results").glob("*/table.md")))
    known = set(re.findall(r"\d+\.\d+", tables))
    readme = (ROOT / "README.md").read_text()
    pages = [
        (ROOT / "docs/results.md").read_text(),
        readme[readme.index("## Does it work?") : readme.index("## One training step")],
    ]
    for page in pages:
        numbers = re.findall(r"\d+\.\d{3}\b|\d+\.\d(?= ?%)", page)
        assert [number for number in numbers if number not in known] == []
