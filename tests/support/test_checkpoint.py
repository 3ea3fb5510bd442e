"""Saves and logs: killed at every point, and gone on from with other inputs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import config_of, tiny_model

import toy
from support import checkpoint, runs
from support import config as configs
from support.config import UserError
from support.optimizer import MasterAdamW

INPUTS = {"model": "1", "the training problems": "2", "evaluation.data": "3"}
LOGGED = [{"step": 0, "eval/pass@1": 0.5}, *({"step": step, "loss": 0.0} for step in (1, 2, 3, 4, 5))]


def make_run(*words, seed=0):
    model = tiny_model(seed=seed)
    optimizer = MasterAdamW(model.named_parameters(), lr=0.1, weight_decay=0.0)
    return SimpleNamespace(config=config_of("save_every=2", *words), policy=model, tokenizer=toy.make_tokenizer(20),
                           optimizer=optimizer, inputs=dict(INPUTS))


def train_and_save(folder, run, *steps):
    for step in steps:
        torch.manual_seed(step)
        for parameter in run.policy.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.optimizer.step()
        checkpoint.save(folder, step, run)


def write_log(folder, rows=LOGGED):
    folder.mkdir(parents=True, exist_ok=True)
    keys = configs.override(configs.read_defaults(), ["save_every=2"])
    (folder / "config.yaml").write_text(yaml.safe_dump(configs.nest(keys)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves") / "runs" / "x"
    write_log(folder)
    train_and_save(folder, make_run(), 2, 4)
    return folder


@pytest.fixture
def folder(two_saves, tmp_path):
    return Path(shutil.copytree(two_saves, tmp_path / "runs" / "x"))


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_save_gives_back_weights_and_optimizer(folder):
    run, again = make_run(), make_run(seed=1)
    train_and_save(folder.parent / "y", run, 2, 4)
    assert checkpoint.load(checkpoint.newest(folder, again), again) == 4 and again.optimizer.steps == 2
    for (name, weight), other in zip(run.policy.named_parameters(), again.policy.parameters()):
        assert torch.equal(weight, other), name
        for key, value in run.optimizer.state[weight].items():
            assert torch.equal(value, again.optimizer.state[other][key])


@pytest.mark.parametrize("key", INPUTS)
def test_other_inputs_are_named_and_refused(folder, key):
    run = make_run()
    run.inputs[key] = "other"
    with pytest.raises(UserError, match=f"since the run in {folder} began, {key} changed: put back"):
        checkpoint.newest(folder, run)


def test_without_a_save_true_is_refused_and_auto_starts_anew(tmp_path):
    run = make_run()
    write_log(tmp_path, LOGGED[:3])
    (tmp_path / "checkpoints" / "step-000002.tmp").mkdir(parents=True)
    run.config.resume = True
    with pytest.raises(UserError, match=f"{tmp_path} has no save to go on from"):
        checkpoint.newest(tmp_path, run)
    run.config.resume = "auto"
    assert checkpoint.newest(tmp_path, run) is None


# ---------------------------------------------------------------- writing


def test_the_newest_are_kept_also_behind_a_link(tmp_path):
    (tmp_path / "large disk").mkdir()
    folder, run = tmp_path / "run", make_run("keep=2")
    write_log(folder)
    (folder / "checkpoints").symlink_to(tmp_path / "large disk")
    for step in (2, 4, 6):
        train_and_save(folder, run, step)
    assert names(folder) == ["step-000004", "step-000006"] and (folder / "checkpoints").is_symlink()
    train_and_save(folder, make_run("keep=1"), 8)
    assert names(folder) == ["step-000008"]


class Killed(BaseException):
    """Nothing that a program does then is done."""


def test_whatever_a_save_is_killed_at_one_is_whole(folder, monkeypatch):
    """At each call that makes something take effect in turn, until a save meets none of them."""
    calls, kept = [], []
    for cut in range(100):
        work = Path(shutil.copytree(folder, folder.parent / f"cut{cut}"))
        run, count = make_run("keep=1"), iter(range(1000))

        def stumble(real, cut=cut, count=count):
            def call(*arguments, **named):
                if next(count) == cut:
                    raise Killed
                return real(*arguments, **named)
            return call

        with monkeypatch.context() as patch:
            for owner, name in ((torch, "save"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
                                (shutil, "rmtree")):
                patch.setattr(owner, name, stumble(getattr(owner, name)))
            try:
                train_and_save(work, run, 6)
                calls.append("whole")
            except Killed:
                calls.append("killed")
        saved = checkpoint.newest(work, run)
        kept.append(checkpoint.load(saved, run))
        log = runs.Log(work, configs.read_stored(work / "config.yaml"), 4, active=True)
        assert not list(work.glob("**/*.tmp")) and len(runs.read_log(log.folder / "metrics.jsonl")) == 5
        train_and_save(work, run, 8)
        assert names(work) == ["step-000008"]
        shutil.rmtree(work)
        if calls[-1] == "whole":
            break
    assert len(calls) > 5 and kept == sorted(kept) and set(kept) == {4, 6}


# ---------------------------------------------------------------- the folder and the logs


def open_log(folder, start, words=(), active=True):
    keys = configs.override(configs.read_defaults(), ["save_every=2", *words])
    return runs.Log(folder, keys, start, active=active)


@pytest.mark.parametrize("start, told, steps", [
    (2, "going on after step 2; steps 3-5 are done again", [0, 1, 2]), (5, "going on after step 5", [0, 1, 2, 3, 4, 5]),
    (4, "going on after step 4; step 5 is done again", [0, 1, 2, 3, 4]),
    (0, "no step was saved yet: starting again; steps 1-5 are done again", [])])
def test_what_is_done_again_is_said(tmp_path, capsys, start, told, steps):
    write_log(tmp_path)
    open_log(tmp_path, start)
    assert capsys.readouterr().out.strip() == told
    assert [row["step"] for row in runs.read_log(tmp_path / "metrics.jsonl")] == steps


def test_log_lines_are_json_and_whole_or_absent(tmp_path):
    log = open_log(tmp_path / "x", 0)
    log.metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    file = tmp_path / "x" / "metrics.jsonl"
    assert file.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'
    with file.open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert len(runs.read_log(file)) == 1  # a last line without its end
    open_log(tmp_path / "x", 1).metrics({"step": 2})
    assert [row["step"] for row in runs.read_log(file)] == [1, 2]


def test_a_start_that_never_was_one_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of("name=x")
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    for left in ("lock", "config.yaml.tmp", "notes.txt"):
        (folder / left).touch()
    for resume, expected in ((False, False), ("auto", False)):
        config.resume = resume
        keys = configs.read_defaults() | {"name": "x"}
        assert runs.run_folder(config, keys) == folder and config.resume == expected
    open_log(folder, 0)
    assert not (folder / "config.yaml.tmp").exists() and (folder / "notes.txt").exists()
    config.resume = False
    with pytest.raises(UserError, match="already holds a run"):
        runs.run_folder(config, keys)
    config.resume, keys = "auto", configs.read_defaults() | {"name": "x", "save_every": 2}
    assert runs.run_folder(config, keys) == folder and config.resume == "auto"
    (folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml is damaged"):
        runs.run_folder(config, keys)


def test_names_that_no_folder_can_have_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for resume in (False, True, "auto"):
        config = config_of(f"name={'n' * 300}")
        config.resume = resume
        with pytest.raises(UserError, match="at most 200"):
            runs.run_folder(config, configs.read_defaults())
    assert configs.training_keys([f"name={'n' * 300}", "resume=true"])["resume"] is True
