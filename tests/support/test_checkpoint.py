"""Saves and logs: damaged in every way, cut off at every point, on a full disk, with other inputs."""

import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import config_of, tiny_model
from safetensors.torch import load_file, save_file

import toy
from support import checkpoint, files, runs
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


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


DAMAGES = {"cut": lambda file: os.truncate(file, file.stat().st_size // 2), "empty": lambda file: os.truncate(file, 0),
           "a flipped bit": flip, "missing": lambda file: file.unlink(),
           "garbage": lambda file: file.write_bytes(b"\x80garbage")}

# ---------------------------------------------------------------- what is whole


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer-0.pt", "manifest.json", "tokenizer.json"])
def test_the_newest_whole_save_is_taken_and_none_means_refused(folder, file, damage, capsys):
    newest, before = folder / "checkpoints" / "step-000004", folder / "checkpoints" / "step-000002"
    run = make_run(seed=1)
    assert checkpoint.newest(folder, run) == newest and capsys.readouterr().err == ""
    DAMAGES[damage](newest / file)
    saved = checkpoint.newest(folder, run)
    told = capsys.readouterr().err
    assert saved == before and told.count("\n") == 1 and str(newest) in told and file in told and "passed over" in told
    assert checkpoint.load(saved, run) == 2 and run.optimizer.steps == 1
    DAMAGES[damage](before / file)
    with pytest.raises(UserError, match="no save is whole") as refused:
        checkpoint.newest(folder, run)
    assert refused.value.status == 2 and file in str(refused.value) and "\n" not in str(refused.value)
    assert names(folder) == ["step-000002", "step-000004"] and len(runs.read_log(folder / "metrics.jsonl")) == 6


def test_a_save_gives_back_weights_and_optimizer(folder):
    run, again = make_run(), make_run(seed=1)
    train_and_save(folder.parent / "y", run, 2, 4)
    assert checkpoint.load(checkpoint.newest(folder, again), again) == 4 and again.optimizer.steps == 2
    for (name, weight), other in zip(run.policy.named_parameters(), again.policy.parameters()):
        assert torch.equal(weight, other), name
        for key, value in run.optimizer.state[weight].items():
            assert torch.equal(value, again.optimizer.state[other][key])


def resign(saved):
    """The manifest of what is there now: damage that no checksum finds, as if it had been saved so."""
    body = json.loads((saved / "manifest.json").read_text())
    body.pop("own")
    body["files"] = {name: [(saved / name).stat().st_size, files.checksum(saved / name)] for name in body["files"]}
    (saved / "manifest.json").write_text(json.dumps(body | {"own": files.json_sum(body)}))


def change_weights(change):
    def apply(saved):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    return apply


def change_shard(change):
    def apply(saved):
        shard = torch.load(saved / "optimizer-0.pt", weights_only=True)
        change(shard, shard["optimizer"]["state"])
        torch.save(shard, saved / "optimizer-0.pt")
    return apply


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


NORM = "model.norm.weight"
CONTENTS = {
    "a missing tensor": (change_weights(lambda t: t.pop(NORM)), f"1 not there ({NORM})"),
    "a tensor too many": (change_weights(lambda t: t.update(other=torch.ones(2))), "1 not this model's (other)"),
    "another shape": (change_weights(lambda t: t.update({NORM: torch.ones(9)})), f"({NORM} [9] for [32])"),
    "a step of 99": (change_shard(lambda shard, state: shard.update(step=99)), "is of step 99, not 4"),
    "no Adam state": (change_shard(lambda shard, state: state.pop(NORM)), f"not hold what is needed of '{NORM}'"),
    "half an Adam state": (change_shard(lambda shard, state: state[NORM].pop("exp_avg")), f"needed of '{NORM}'"),
    "an Adam state of one number": (change_shard(lambda shard, state: state[NORM].update(exp_avg=torch.ones(1))), NORM),
    "an Adam state of NaN": (change_shard(lambda shard, state: state[NORM]["exp_avg"].fill_(torch.nan)), NORM),
    "an Adam state too many": (change_shard(lambda shard, state: state.update(other=state[NORM])), "'other'"),
    "no step": (change_shard(lambda shard, state: shard.pop("step")), "optimizer-0.pt cannot be read"),
    "code": (lambda saved: torch.save(Malice(), saved / "optimizer-0.pt"), "optimizer-0.pt cannot be read"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_save_that_holds_something_else_is_refused(folder, content, monkeypatch):
    monkeypatch.chdir(folder)
    damage, words = CONTENTS[content]
    damage(folder / "checkpoints" / "step-000004")
    resign(folder / "checkpoints" / "step-000004")
    run = make_run()
    with pytest.raises(UserError) as refused:
        checkpoint.load(checkpoint.newest(folder, run), run)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("key", INPUTS)
def test_other_inputs_are_named_and_refused(folder, key):
    run = make_run()
    run.inputs[key] = "other"
    with pytest.raises(UserError, match=f"since the run in {folder} began, {key} changed: put back"):
        checkpoint.newest(folder, run)


@pytest.mark.parametrize("old", ["checkpoint/trainer.pt", "checkpoint/optimizer-0.pt", "checkpoint.old/optimizer-0.pt"])
def test_the_layouts_of_earlier_versions_are_refused(tmp_path, old):
    write_log(tmp_path)
    (tmp_path / old).parent.mkdir()
    (tmp_path / old).touch()
    with pytest.raises(UserError, match=f"{(tmp_path / old).parent} is of an earlier version"):
        checkpoint.newest(tmp_path, make_run())


def test_a_tokenizer_of_several_chat_templates_has_a_folder_of_them(tmp_path):
    run = make_run()
    run.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    checkpoint.save(tmp_path, 2, run)
    (inner,) = (tmp_path / "checkpoints" / "step-000002" / "additional_chat_templates").iterdir()
    assert not checkpoint.fault(inner.parents[1])
    flip(inner)
    assert "tool_use" in checkpoint.fault(inner.parents[1])


@pytest.mark.parametrize("left", ["model", "evaluation.json"])
def test_a_finished_run_without_saves_is_not_begun_again(tmp_path, left):
    write_log(tmp_path, LOGGED[:2])
    (tmp_path / left).mkdir()
    with pytest.raises(UserError, match="none is in"):
        checkpoint.newest(tmp_path, make_run())


def test_a_lost_save_is_told_apart_from_none_yet(tmp_path):
    run = make_run()
    write_log(tmp_path, LOGGED[:3])  # ended in step 3, or in the save of step 2
    assert checkpoint.newest(tmp_path, run) is None
    write_log(tmp_path, LOGGED[:4])  # step 3 was done: step 2 had been saved
    with pytest.raises(UserError, match="3 steps in its log, the first save was due after 2, and none is in"):
        checkpoint.newest(tmp_path, run)
    (tmp_path / "checkpoints" / "step-000002.tmp").mkdir(parents=True)  # nor is that one
    with pytest.raises(UserError, match="none is in"):
        checkpoint.newest(tmp_path, run)


# ---------------------------------------------------------------- writing


def test_the_newest_are_kept_also_behind_a_link(tmp_path):
    (tmp_path / "large disk").mkdir()
    folder, run = tmp_path / "run", make_run("keep=2")
    write_log(folder)
    (folder / "checkpoints").symlink_to(tmp_path / "large disk")
    for step in (2, 4, 6):
        train_and_save(folder, run, step)
    assert names(folder) == ["step-000004", "step-000006"] and (folder / "checkpoints").is_symlink()
    flip(folder / "checkpoints" / "step-000006" / "optimizer-0.pt")
    os.truncate(folder / "checkpoints" / "step-000006" / "model.safetensors", 9)  # from 4 on; then other steps
    train_and_save(folder, run, 5)
    assert names(folder) == ["step-000004", "step-000005"]  # the damaged one is not among the two
    train_and_save(folder, make_run("keep=1"), 6)
    assert names(folder) == ["step-000006"]


class Killed(BaseException):
    """Nothing that a program does then is done."""


@pytest.mark.parametrize("failure", [Killed, OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_whatever_a_save_is_cut_off_at_one_is_whole(folder, monkeypatch, failure, capsys):
    """At each call that makes something take effect in turn, until a save meets none of them."""
    calls, kept = [], []
    for cut in range(100):
        work = Path(shutil.copytree(folder, folder.parent / f"cut{cut}"))
        run, count = make_run("keep=1"), iter(range(1000))

        def stumble(real, cut=cut, count=count):
            def call(*arguments, **named):
                if next(count) == cut:
                    raise failure
                return real(*arguments, **named)
            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
                                (shutil, "rmtree")):
                patch.setattr(owner, name, stumble(getattr(owner, name)))
            try:
                train_and_save(work, run, 6)
                calls.append("whole")
            except Killed:
                calls.append("killed")
            except files.DiskError as error:
                assert error.status == 1 and "step-000006" in str(error) and "No space left" in str(error)
                assert not list(work.glob("*/*.tmp")) or failure is Killed
                calls.append("told")
            except OSError:  # while old ones are deleted, after the save has taken effect
                calls.append("deleting")
        kept.append(checkpoint.newest(work, run).name)
        log = runs.Log(work, configs.read_stored(work / "config.yaml"), 4, active=True)
        assert not list(work.glob("**/*.tmp")) and len(runs.read_log(log.folder / "metrics.jsonl")) == 5
        train_and_save(work, run, 8)
        assert names(work) == ["step-000008"]
        shutil.rmtree(work)
        if calls[-1] == "whole":
            break
    assert len(calls) > 10 and set(kept[:8]) == {"step-000004"} and kept[-1] == "step-000006"
    assert capsys.readouterr().err == ""  # what is left over is none, and not passed over


@contextmanager
def largest_file(size):
    """The kernel refuses to write beyond it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 500, 30_000, 60_000])
def test_a_disk_that_takes_a_part_leaves_the_last_save(folder, size):
    """Torch, safetensors, tokenizers and json each fail in words of their own."""
    run = make_run()
    with largest_file(size), pytest.raises(files.DiskError, match="cannot write .*/checkpoints/step-000006: "):
        checkpoint.save(folder, 6, run)
    assert names(folder) == ["step-000002", "step-000004"] and checkpoint.newest(folder, run).name == "step-000004"
    with largest_file(size), pytest.raises(files.DiskError, match="cannot write .*/model: "):
        with files.replace_folder(folder / "model") as unfinished:
            run.policy.save_pretrained(unfinished)
    assert not list(folder.glob("model*"))


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
    with largest_file(file.stat().st_size + 9), pytest.raises(files.DiskError, match=f"cannot write {file}: "):
        log.metrics({"step": 2, "loss": 0.0})
    assert runs.read_log(file) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]
    with file.open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert len(runs.read_log(file)) == 1  # a last line without its end
    open_log(tmp_path / "x", 1).metrics({"step": 2})
    assert [row["step"] for row in runs.read_log(file)] == [1, 2]


@pytest.mark.parametrize("garbage", ["garbage", "{", "\x00\x00", "[1]", "3", '{"loss": 1}', '{"step": "2"}', ""])
def test_a_damaged_line_is_named(tmp_path, garbage):
    write_log(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], garbage, *lines[2:], ""]))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"metrics.jsonl, line 3, is damaged: .*delete that line"):
        open_log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


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
    assert runs.run_folder(config, keys) == folder and config.resume is True
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
