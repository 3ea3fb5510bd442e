"""Settings, and mistakes of the user: one line on stderr that names the thing, and exit code 2."""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import evaluate
import train
from support.config import (
    RunError,
    UserError,
    flatten,
    load_config,
    nest,
    one_line_errors,
    out_of_memory,
    read_defaults,
    read_run_config,
    split_list,
    to_yaml,
)


def run_here(folder, *arguments):
    """Run a training that fails, in a folder but in this process."""
    stderr = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            train.main(list(arguments))
    return SimpleNamespace(returncode=ended.value.code, stderr=stderr.getvalue())


def check_message(result, *words):
    """Expect exit code 2 and one line of error with these words; notes may come before it."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), result.stderr
    assert all(line.startswith("note: ") for line in lines[:-1]), result.stderr
    for word in words:
        assert word in lines[-1]


BAD = {
    "unknown key": ("selection.strategi=none", "did you mean selection.strategy?"),
    "no equals sign": ("--fast", "key=value"),
    "a group": ("optimizer=lr", "did you mean optimizer.lr?"),
    "unknown key of a group": (
        "optimizer.betas=1",
        "the keys are optimizer.lr, optimizer.schedule",
    ),
    "text for a number": ("steps=many", "whole number"),
    "float for a whole number": ("steps=1.5", "whole number"),
    "number for a truth value": ("resume=1", "true or false"),
    "truth value for a number": ("steps=true", "whole number"),
    "q below 0": ("selection.fraction=-0.1", "at least 0"),
    "infinite": ("optimizer.lr=inf", "give a number"),
    "too large for a float": ("steps=1e400", "whole number"),
    "seed too large": ("seed=99999999999999999999", "at most"),
    "group of one": ("group_size=1", "at least 2"),
    "temperature 0": ("temperature=0.0", "temperature=0 is greedy"),
    "unknown schedule": ("optimizer.schedule=linear", "cosine or constant"),
    "unknown normaliser": ("grpo.normaliser=batch", "token or sequence"),
    "folder without a model": ("model=.", "config.json"),
    "prompt without target": ("prompt.countdown={numbers}", "{target}"),
    "missing recipe": ("recipe=recipes/no.yaml", "no such file"),
    "validation share above 1": ("validation_fraction=2.0", "at most 1"),
    "all tokens fork": ("forking_fraction=1.0", "below 1"),
    "no token forks": ("forking_fraction=0.0", "more than 0"),
    "name with a path": ("name=../x", "plain folder name"),
    "no name": ("name=", "plain folder name"),
    "name too long for a folder": (f"name={'n' * 300}", "at most 200 bytes"),
    "hidden size that heads do not divide": ("toy.hidden=130", "multiple of 8"),
    "countdown too small": ("countdown.limit=10", "countdown.largest=20"),
}


@pytest.mark.parametrize("argument, words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(tmp_path, argument, words):
    result = run_here(tmp_path, argument)
    check_message(result, words)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name.endswith("lock") for name in files)


MEMORY = "error: out of memory\n"
CPU_MEMORY = RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.mark.parametrize(
    "error, code, line, on_others",
    [
        (UserError("a"), 2, "error: a\n", ""),
        (RunError("b"), 1, "error: b\n", ""),
        (torch.OutOfMemoryError("of 80 GB"), 1, MEMORY, MEMORY),
        (MemoryError(), 1, MEMORY, MEMORY),
        (CPU_MEMORY, 1, MEMORY, MEMORY),
        (OSError("disk is full"), 1, "error: disk is full\n", "error: disk is full\n"),
        (KeyboardInterrupt(), 130, "", ""),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, error, code, line, on_others):
    """With torchrun all ranks make the same mistake, and rank 0 reports it."""
    for rank, expected in (("0", line), ("1", on_others)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise error
        assert ended.value.code == code
        assert capsys.readouterr().err == expected


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"), one_line_errors():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    for error in (OSError(28, "no space left", "/alloc"), KeyError("allocation")):
        assert out_of_memory(error) == ""
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling ..."):
        assert out_of_memory(RuntimeError(text)) == "out of memory"


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_run(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, "latin-1"))
    with one_line_errors():
        print("\u2192 x", flush=True)
    assert terminal.getvalue() == b"? x\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (b"\0", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"? [1]\n: 2", "unhashable"),
        (b"", "give a YAML file"),
        (b"- steps", "give a YAML file"),
        (b"steps: [1]", "steps=[1]: give a whole number"),
        (b"steps: null", "give a whole number"),
        (b"5: 6", "unknown key 5"),
        (b"name: 2026-11-22", "give text (in quotes)"),
        (b"steps: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
    ],
)
def test_a_recipe_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_bytes(text)
    check_message(run_here(tmp_path, "recipe=recipe.yaml"), words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_problems_must_divide_by_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_message(run_here(tmp_path, "prompts_per_step=3"), "prompts_per_step=3", "multiple of 2")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "argument, value",
    [
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=1E-5", 1e-5),
        ("optimizer.lr=2.5e-06", 2.5e-6),
        ("optimizer.lr=3", 3.0),
        ("steps=1_000", 1000),
        ("steps=1e3", 1000),
        ("seed=010", 10),
        ("dry_run=True", True),
        ("name=1e5", "1e5"),
        ("name=3", "3"),
    ],
)
def test_a_value_has_the_type_of_its_default(tmp_path, argument, value):
    """On the command line and in a recipe, where numbers are written in the same way."""
    key, _, text = argument.partition("=")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml({key: 0}).replace(" 0", f" '{text}'"))
    for arguments in ([argument], [f"recipe={recipe}"]):
        result = flatten(load_config(arguments))[key]
        assert result == value
        assert type(result) is type(value)


def test_arguments_are_laid_over_a_recipe_and_a_recipe_over_the_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 7\nseed: 3\noptimizer: {lr: 1e-6}\n")
    config = load_config([f"recipe={tmp_path / 'recipe.yaml'}", "seed=4", "extra=5"], {"extra": 1})
    values = (config.steps, config.seed, config.optimizer.lr, config.extra, config.group_size)
    assert values == (7, 4, 1e-6, 5, 8)


@pytest.mark.parametrize("name", ["1e-6", "010", "yes", "a: b"])
def test_a_resumed_run_has_the_settings_that_were_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written = read_defaults() | {"steps": 7, "optimizer.lr": 1e-6, "name": name}
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.yaml").write_text(to_yaml(written | {"gone": 1}))
    assert read_run_config(tmp_path / "runs" / name) == written
    for resume, steps in (("true", 7), ("auto", 7), ("false", 200)):
        config = load_config([f"name={name}", f"resume={resume}", "seed=5"])
        assert (config.steps, config.seed, config.name) == (steps, 5, name)


def test_lists():
    assert split_list("[a,b]") == split_list("a, b") == ["a", "b"]
    assert split_list("a") == ["a"]
    for text in ("", "[]", "a,,b"):
        with pytest.raises(UserError, match="give a word, or several as"):
            split_list(text)


def test_flatten_and_nest_are_inverse():
    flat = read_defaults()
    assert flatten(nest(flat)) == flat
    assert all(value is not None for value in flat.values())  # a default has a type to convert to


@pytest.mark.parametrize("command", [train, evaluate])
def test_help_shows_the_docstring_and_every_setting(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["steps=1", "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.startswith(command.__doc__.strip())
    assert (ROOT / "config.yaml").read_text() in printed
    for key in getattr(command, "SETTINGS", {}):
        assert f"\n{key}: " in printed
