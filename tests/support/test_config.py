"""Bad input: one line on stderr that names the thing and the mend, exit code 2, nothing written, at once."""

import contextlib
import importlib
import inspect
import io
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT

import evaluate
import train
from support import config, help


def run(cwd, *arguments, script="train.py", **environment):
    """The real command."""
    return subprocess.run([sys.executable, ROOT / script, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env=os.environ | environment)


def run_here(cwd, *arguments, command=train, keys=config.training_keys):
    """The same without a process of its own."""
    stderr = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config.signals, "listen", lambda: None)  # pytest has its own way to stop
            with config.one_line_errors():
                command.main(keys(list(arguments)))
    return SimpleNamespace(returncode=ended.value.code, stderr=stderr.getvalue())


def check_message(result, *words):
    """One line that holds these words, and exit code 2."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


BAD = {
    "unknown key": (["selection.strategi=none"], ["selection.strategi", "selection.strategy"]),
    "unknown group": (["optimiser.lr=1.0"], ["optimiser.lr", "optimizer.lr"]),
    "no equals sign": (["--fast"], ["--fast", "key=value"]),
    "a group": (["optimizer=lr"], ["optimizer is a group", "optimizer.lr, optimizer.schedule"]),
    "a typo": (["selection.stratgy=none"], ["did you mean selection.strategy?"]),
    "null for a number": (["steps=null"], ["steps=null", "whole number"]),
    "text for a number": (["steps=many"], ["steps=many", "whole number"]),
    "float for a whole number": (["steps=1.5"], ["steps=1.5", "whole number"]),
    "number for a truth value": (["resume=1"], ["resume=1", "true or false or auto"]),
    "truth value for a number": (["steps=true"], ["steps=true", "whole number"]),
    "not YAML": (["steps={"], ["steps={", "whole number"]),
    "q above 1": (["selection.fraction=5.0"], ["selection.fraction=5.0", "at most 1"]),
    "q below 0": (["selection.fraction=-0.1"], ["selection.fraction=-0.1", "at least 0"]),
    "not a number": (["selection.kl_coef=.nan"], ["selection.kl_coef=nan"]),
    "infinite": (["optimizer.lr=.inf"], ["optimizer.lr=inf"]),
    "group of one": (["group_size=1"], ["group_size=1", "at least 2"]),
    "no steps": (["steps=0"], ["steps=0"]),
    "temperature 0": (["temperature=0.0"], ["temperature=0.0", "above 0"]),
    "unknown schedule": (["optimizer.schedule=linear"], ["linear", "cosine or constant"]),
    "missing model folder": (["model=models/here/not"], ["models/here/not", "no such folder"]),
    "missing model folder, dotted": (["model=./nowhere"], ["./nowhere", "no such folder"]),
    "folder without a model": (["model=."], ["model=.", "config.json"]),
    "missing data": (["data=nothing.jsonl"], ["data=nothing.jsonl", "no such file"]),
    "prompt without target": (["prompt.countdown={numbers}"], ["prompt.countdown=", "{target}"]),
    "prompt without problem": (["prompt.plain=Solve it."], ["prompt.plain=", "{problem}"]),
    "unknown grader": (["reward.grader=sympy"], ["reward.grader=sympy", "exact or math_verify"]),
    "levels of countdown": (["data.filter=level=3"], ["data.filter=level=3", "data=FILE"]),
    "missing recipe": (["recipe=recipes/no.yaml"], ["recipe=recipes/no.yaml", "no such file"]),
    "validation share above 1": (["data.validation=2.0"], ["data.validation=2.0", "at most 1"]),
    "unknown normaliser": (["grpo.normaliser=batch"], ["batch", "token or sequence"]),
    "unknown KL": (["selection.kl=k2"], ["k2", "full or k3"]),
    "no Weights & Biases": (["log.wandb=mine"], ["log.wandb=mine", "pip install wandb"]),
    "no TensorBoard": (["log.tensorboard=true"], ["log.tensorboard=true", "pip install tensorboard"]),
    "RLIF with div": (["reward=token_entropy", "objective=div"], ["objective=div", "reward=accuracy"]),
    "selection that pays nothing": (["selection.kl_coef=0"], ["selection.kl_coef=0", "strategy=none"]),
    "all tokens fork": (["forking_fraction=1.0"], ["forking_fraction=1.0", "below 1"]),
    "no token forks": (["forking_fraction=0.0"], ["forking_fraction=0.0", "above 0"]),
    "updates that do not divide": (["grpo.updates_per_rollout=3"], ["3 updates per rollout", "multiple of 3"]),
    "empty covariance band": (["clip_cov.low=6.0"], ["clip_cov.low=6.0", "clip_cov.high=5.0"]),
    "name with a path": (["name=../x"], ["name=../x", "plain folder name"]),
    "no name": (["name="], ["plain folder name"]),
    "seed too large": (["seed=99999999999999999999"], ["seed=99999999999999999999", "at most"]),
    "odd heads": (["toy.heads=5", "toy.hidden=130"], ["toy.heads=5", "even"]),
    "YAML that constructs": (["steps=!!int x"], ["steps=!!int x", "whole number"]),
    "a date": (["seed=2020-13-45"], ["seed=2020-13-45", "whole number"]),
    "octal": (["seed=010"], ["seed=010", "whole number"]),
    "brackets": (["steps=" + "[" * 5000], ["steps=[[", "whole number"]),
    "a recipe in a folder": (["recipe=."], ["recipe=.", "no such file"]),
    "countdown too small": (["countdown.limit=10"], ["countdown.limit=10", "countdown.largest=20"]),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(tmp_path, arguments, words):
    check_message(run_here(tmp_path, *arguments), *words)
    assert not list(tmp_path.iterdir())


def bomb() -> str:
    levels = [f"{two}: &{two} [{', '.join(['*' + one] * 9)}]" for one, two in zip("abcdefgh", "bcdefghi")]
    return "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *levels])


@pytest.mark.parametrize("text, words", [
    (bomb(), "references"), ("steps: &x [*x]", "references"), ("steps: 1\nseed: 2\nsteps: 3", "steps stands twice"),
    ("optimizer: {lr: 1.0e-5}\noptimizer: {schedule: constant}", "optimizer stands twice"),
    ("steps: !!python/object/apply:os.system [touch touched]", "could not determine a constructor"),
    ("[" * 5000, "RecursionError"), ("steps: 0" + "0" * 99_999, "longer"), ("? [1]\n: 2", "unhashable"),
    ("\0", "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), ("", "give a YAML file"),
    ("- steps", "give a YAML file"),
    ("steps: [1]", "steps=[1]: needs a whole number"), ("steps: null", "needs a whole number"),
    ("5: 6", "unknown config key '5'"),
])
def test_hostile_recipes(tmp_path, text, words):
    """One line, soon, and nothing made or run."""
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    check_message(run_here(tmp_path, "recipe=recipe.yaml"), "recipe=recipe.yaml", words)
    assert time.process_time() - started < 10 and len(list(tmp_path.iterdir())) == 1


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    check_message(run_here(tmp_path, "recipe=recipe.yaml"), "no such file")


def test_a_typo_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    check_message(run(tmp_path, "steps=x", PYTHONPATH=str(tmp_path)), "steps=x")


def test_unknown_methods(tmp_path):
    check_message(run_here(tmp_path, "selection.strategy=best"), "selection.strategy=best", "scope")
    check_message(run_here(tmp_path, "reward=praise"), "reward=praise", "self_certainty")
    check_message(run_here(tmp_path, "objective=ppo"), "objective=ppo", "kl_cov")
    assert not list(tmp_path.iterdir())


def test_problems_must_divide_by_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_message(run_here(tmp_path, "prompts_per_step=3"), "prompts_per_step=3", "2 ranks")


def test_only_rank_0_speaks(tmp_path):
    result = run(tmp_path, "steps=x", RANK="1", WORLD_SIZE="2")
    assert result.returncode == 2 and not result.stderr


def test_folder_of_another_run(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text("{}")
    check_message(run_here(tmp_path, "name=mine"), "runs/mine", "resume=true", "name=")
    check_message(run_here(tmp_path, "name=other", "resume=true"), "runs/other", "holds no run")


def test_resume_with_other_settings(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    keys = config.override(config.read_defaults(), ["name=mine"])
    (tmp_path / "runs" / "mine" / "config.yaml").write_text(yaml.safe_dump(config.nest(keys)))
    check_message(run_here(tmp_path, "name=mine", "resume=true", "optimizer.lr=0.5"),
                  f"optimizer.lr={keys['optimizer.lr']}, not 0.5")


@pytest.mark.parametrize("name", ["1e-6", "7e12345", "010", "0x1f", "on", "2026-11-22", "1_000", ".5", "null", "a: b"])
def test_settings_come_back_as_they_were_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    keys = config.override(config.read_defaults(), ["steps=7", "optimizer.lr=1e-6"]) | {"name": name}
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.yaml").write_text(text := config.write_yaml(config.nest(keys)))
    assert config.read_stored(tmp_path / "runs" / name / "config.yaml") == keys
    assert yaml.safe_load(text)["name"] == name  # to YAML 1.1 too
    if name != "null":  # on the command line that is no name
        assert config.training_keys([f"name={name}", "resume=yes"])["steps"] == 7


def test_bad_data_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n{"numbers": 3}\n')
    check_message(run_here(tmp_path, "data=p.jsonl"), "p.jsonl, line 2")
    assert not (tmp_path / "runs").exists()


def test_too_few_problems(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"numbers": [1, 2], "target": 3}\n')
    check_message(run_here(tmp_path, "data=p.jsonl"), "prompts_per_step=32", "only 0 problems",
         "1 of 1 problems of p.jsonl are on")


def test_evaluate_speaks_the_same_way(tmp_path):
    for words in (["temperature=0", "samples=1"], ["model=nowhere", "no such folder"],
                  ["samples=0"], ["steps=3", "unknown config key 'steps'"]):
        result = run_here(tmp_path, words[0], command=evaluate, keys=config.evaluation_keys)
        check_message(result, words[-1])
    check_message(run(tmp_path, "samples=0", script="evaluate.py"), "samples=0")


def test_text_where_config_yaml_needs_a_number():
    with pytest.raises(config.UserError, match="optimizer.lr='small'.*not a number"):
        config.check(config.read_defaults() | {"optimizer.lr": "small"})


@pytest.mark.parametrize("word, value", [
    ("optimizer.lr=1e-5", 1e-5), ("optimizer.lr=1E-5", 1e-5), ("optimizer.lr=2.5e-06", 2.5e-6), ("optimizer.lr=3", 3.0),
    ("steps=1_000", 1000), ("steps=1e3", 1000), ("recipe=null", ""), ("data.filter=~", ""), ("name=1e5", "1e5")])
def test_words_are_read_as_people_mean_them(tmp_path, word, value):
    """On the command line and in a recipe alike."""
    key, _, text = word.partition("=")
    found = config.override(config.read_defaults(), [word])[key]
    assert found == value and type(found) is type(value)
    if type(value) is not str:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.nest({key: 0})).replace(" 0", f" {text}"))
        assert config.recipe_keys([f"recipe={tmp_path / 'recipe.yaml'}"], config.read_defaults()) == {key: value}


def test_help(tmp_path, capsys):
    """What the command does, three examples, and every key with its default and comment; before torch is imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = run(tmp_path, "--help", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout.count("train.py ") >= 3
    for key in config.read_defaults():
        assert f"{key.rpartition('.')[2]}:" in result.stdout, key
    assert "# GRPO" not in result.stdout and "0.05          # q: budget as a share" in result.stdout
    told = run(tmp_path, "-h", PYTHONPATH=str(tmp_path), script="evaluate.py").stdout
    assert told.count("evaluate.py ") >= 3 and "temperature: 1.0" in told and "optimizer:" not in told
    with pytest.raises(SystemExit) as ended:
        help.answer(["steps=1", "help"], train.__doc__, config.read_defaults())
    assert ended.value.code == 0 and capsys.readouterr().out == result.stdout


@pytest.mark.parametrize("command", ["reproduce.py", "benchmark.py", "analysis.law", "analysis.tokens",
                                     "analysis.tightness"])
def test_help_of_every_other_command(command, monkeypatch, capsys):
    module = importlib.import_module(command.removesuffix(".py"))
    if command.endswith(".py"):  # it answers before its imports
        with pytest.raises(SystemExit) as ended:
            help.answer(["--help"], module.__doc__, getattr(module, "OWN", {}) | config.read_defaults())
        assert "help.answer(sys.argv[1:], __doc__" in inspect.getsource(module)
    else:
        with pytest.raises(SystemExit) as ended:
            module.main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and told.startswith(module.__doc__.strip())
    assert f"\n{'steps' if command == 'benchmark.py' else 'out'}: " in told


def test_values_take_their_defaults_type():
    keys = config.override(config.read_defaults(), ["optimizer.lr=1", "steps=7", "name=3", "resume=true", "data=a"])
    assert (keys["optimizer.lr"], keys["steps"], keys["name"], keys["resume"]) == (1.0, 7, "3", True)
    assert type(keys["optimizer.lr"]) is float and keys["data.file"] == "a"


def test_flatten_and_nest_are_inverse():
    keys = config.read_defaults()
    assert config.flatten(config.nest(keys)) == keys
    assert all(value is not None for value in keys.values())  # every default has a type to check against
