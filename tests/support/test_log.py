"""A run's folder: its name, what may be resumed, logs."""

import json
import subprocess
from pathlib import Path

import pytest
from helpers import config_of

from support.config import UserError, read_defaults, read_run_config
from support.files import read_jsonl
from support.log import FREE_ON_RESUME, Log, open_run_folder, run_name, versions

# ---------------------------------------------------------------- the folder


def test_a_run_is_named_by_what_differs(in_tmp):
    def name(*arguments):
        return run_name(config_of(*arguments))

    assert name() == "countdown-scope-seed0"
    assert name("selection.strategy=none", "seed=3") == "countdown-none-seed3"
    assert name("steps=50", "optimizer.lr=1e-5", "log_every=3", "seed=2") == (
        "countdown-scope-seed2-steps50-optimizer.lr1e-05"
    )
    assert name("model=Qwen/Qwen2.5-7B", "data=some/where/math.train.jsonl", "objective=div") == (
        "Qwen-Qwen2.5-7B-where-math.train-div-scope-seed0"
    )
    assert name("data=owner/name:config@split") == "owner-name_config_split-scope-seed0"
    long = [name("prompt.plain={problem} " + "x" * 200 + last) for last in "ab"]
    assert len(long[0]) < 100
    assert long[0].startswith("countdown-scope-seed0-prompt.plain_problem_")
    assert long[0] != long[1]
    Path("recipe.yaml").write_text("steps: 7\nselection: {fraction: 0.2}\n")
    assert name("recipe=recipe.yaml") == "countdown-scope-seed0"
    assert name("recipe=recipe.yaml", "steps=8") == "countdown-scope-seed0-steps8"
    Path("recipe.yaml").write_text("model: m\nreward: token_entropy\nmax_new_tokens: 7\n")
    assert name("recipe=recipe.yaml", "data=a/b.jsonl") == "m-a-b-token_entropy-scope-seed0"


def test_what_changes_the_training_is_not_free_on_resume():
    groups = ("optimizer.", "selection.", "grpo.", "evaluation.", "prompt.", "countdown", "toy.")
    others = (
        "model data seed steps precision reward objective grader temperature max_new_tokens "
        "prompts_per_step group_size updates_per_rollout forking_fraction validation_fraction"
    ).split()
    keys = {key for key in read_defaults() if key.startswith(groups)} | {*others}
    assert keys < read_defaults().keys()
    assert len(keys) > 40
    assert not keys & FREE_ON_RESUME


def test_which_folders_are_taken_and_which_can_be_resumed(in_tmp):
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    (folder / "lock").touch()  # left by a run that failed before it began
    for resume in ("false", "auto"):
        assert open_run_folder(config_of("name=x", f"resume={resume}")) == (folder, False)
    with pytest.raises(UserError, match="runs/x holds no run"):
        open_run_folder(config_of("name=x", "resume=true"))
    Log(folder, config_of("name=x", "steps=7"), 0, active=True)
    with pytest.raises(UserError, match="runs/x already holds a run"):
        open_run_folder(config_of("name=x"))
    for resume in ("true", "auto"):
        arguments = ["name=x", f"resume={resume}"]
        resumed = config_of(*arguments, "keep=1", "offload=true", "micro_batch_size=2")
        assert open_run_folder(resumed) == (folder, True)
        assert resumed.steps == 7
        with pytest.raises(UserError, match="steps=7, not 8, optimizer.lr=5e-05, not 0.5: leave"):
            open_run_folder(config_of(*arguments, "optimizer.lr=0.5", "steps=8"))
    (folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml holds no settings"):
        config_of("name=x", "resume=auto")


# ---------------------------------------------------------------- logs


def test_lines_after_the_last_checkpoint_are_dropped(tmp_path, capsys):
    config = config_of("name=1e-6", "resume=auto")
    log = Log(tmp_path, config, 0, active=True)
    for step in range(4):
        log.metrics(step, {"loss": 0.5, "nan": float("nan"), "inf": float("inf")})
        log.sample(step, "2 3 -> 5 :", "2+3=5", 1.0)
    assert "2 3 -> 5 : 2+3=5   [reward 1]" in capsys.readouterr().out
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = Log(tmp_path, config, 2, active=True)
    log.metrics(3, {"loss": 0.25})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2] == {"step": 2, "loss": 0.5, "nan": None, "inf": None}  # JSON has no NaN
    assert rows[3] == {"step": 3, "loss": 0.25}
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0, 1, 2]
    # the evaluation after the last step is done again
    log.metrics(3, {"eval/pass@1": 0.5})
    Log(tmp_path, config_of("name=1e-6", "steps=3"), 3, active=True)
    assert read_jsonl(tmp_path / "metrics.jsonl") == rows
    saved = read_run_config(tmp_path)
    assert saved["name"] == "1e-6"
    assert saved["resume"] is False
    Log(tmp_path, config, 0, active=True)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


# ---------------------------------------------------------------- what others read


def test_a_machine_without_git(monkeypatch):
    expected = versions() | {"commit": ""}
    assert json.dumps(expected)
    monkeypatch.setenv("PATH", "")
    assert versions() == expected


def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    def run_git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    for folder in ("support", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("before")
    run_git("init")
    run_git("add", ".")
    run_git("-c", "user.name=x", "-c", "user.email=x", "commit", "-m", "x")
    monkeypatch.setattr("support.log.__file__", str(tmp_path / "support/log.py"))
    clean = versions()["commit"]
    (tmp_path / "results/file").write_text("after")
    assert clean and versions()["commit"] == clean
    (tmp_path / "support/file").write_text("after")
    assert versions()["commit"] == f"{clean}-dirty"
