"""Checkpoints: what is saved is loaded bit for bit, and what does not fit is named in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ALONE, config_of, run_of, tiny_model
from safetensors.torch import load_file, save_file

from support import checkpoint
from support.config import UserError
from support.distributed import World
from support.optimizer import MasterAdamW
from toy import make_tokenizer

FINGERPRINTS = {"the model": "1", "the training problems": "2", "evaluation.data": "3"}


def make_run(folder, *arguments, seed=0, dtype=torch.float32, world=ALONE):
    policy = tiny_model(seed=seed).to(dtype)
    return run_of(
        policy,
        config_of(*arguments),
        world=world,
        folder=folder,
        tokenizer=make_tokenizer(29),  # as many tokens as the model has
        fingerprints=dict(FINGERPRINTS),
        optimizer=MasterAdamW(policy.named_parameters(), world, lr=0.1, weight_decay=0.0),
    )


def take_steps(run, *steps):
    """Take steps with random gradients."""
    for step in steps:
        torch.manual_seed(step)
        for parameter in run.policy.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.optimizer.step()


def save_steps(run, *steps):
    for step in steps:
        take_steps(run, step)
        checkpoint.save(run, step)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal(run, other):
    """Compare weights and optimizer state bit for bit."""
    assert run.optimizer.steps == other.optimizer.steps
    pairs = zip(run.policy.named_parameters(), other.policy.parameters())
    for (name, weight), other_weight in pairs:
        assert torch.equal(weight, other_weight), name
        for key, value in run.optimizer.state[weight].items():
            assert torch.equal(value, other.optimizer.state[other_weight][key]), (name, key)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    save_steps(make_run(folder), 2, 4)
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path):
    return Path(shutil.copytree(two_checkpoints, tmp_path / "runs" / "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype):
    """Also the fp32 masters of bf16 weights; so the next step is the same, too."""
    run = make_run(tmp_path, dtype=dtype)
    save_steps(run, 2, 4)
    resumed = make_run(tmp_path, seed=1, dtype=dtype)
    saved = checkpoint.latest(tmp_path)
    assert checkpoint.load(resumed, saved) == 4
    assert_equal(run, resumed)
    for either in (run, resumed):
        take_steps(either, 5)
    assert_equal(run, resumed)
    state = json.loads((saved / "state.json").read_text())
    assert (state["step"], state["ranks"], state["fingerprints"]) == (4, 1, FINGERPRINTS)
    assert set(state["versions"]) == {"commit", "python", "torch", "transformers", "device"}


def test_a_checkpoint_gets_its_name_when_every_rank_has_saved(tmp_path):
    """Ranks wait for the folder, and then for the shards of all."""
    seen = []

    class Watching(World):
        def barrier(self):
            seen.append([path.name for path in tmp_path.glob("checkpoints/*/optimizer-*")])
            assert names(tmp_path) == ["step-000001.tmp"]

    save_steps(make_run(tmp_path, world=Watching()), 1)
    assert seen == [[], ["optimizer-0.pt"]]
    assert names(tmp_path) == ["step-000001"]


def test_the_newest_are_kept_also_behind_a_link(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "large disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "large disk")
    save_steps(make_run(tmp_path, "keep=2"), 2, 4, 6)
    assert names(tmp_path) == ["step-000004", "step-000006"]
    save_steps(make_run(tmp_path, "keep=1"), 999_999, 1_000_000)  # one has more digits
    assert names(tmp_path) == ["step-1000000"]
    assert (tmp_path / "checkpoints").is_symlink()


def test_a_save_that_was_killed_is_ignored(folder, monkeypatch):
    run = make_run(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", lambda *arguments: os.kill(os.getpid(), 2))
        checkpoint.save(run, 6)
    assert names(folder) == ["step-000002", "step-000004", "step-000006.tmp"]
    assert checkpoint.latest(folder).name == "step-000004"
    (folder / "checkpoints" / "step-000006.tmp" / "left-over").touch()
    checkpoint.save(run, 6)
    assert names(folder) == ["step-000004", "step-000006"]
    assert not (folder / "checkpoints" / "step-000006" / "left-over").exists()


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_run_that_began_with_something_else_is_refused(folder, name):
    run = make_run(folder)
    run.fingerprints[name] = "other"
    words = f"resume: {name} changed since the run in {folder} began: restore what it was"
    with pytest.raises(UserError, match=words):
        checkpoint.load(run, checkpoint.latest(folder))


class Code:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def change_weights(change):
    """Return a function that changes the tensors of a checkpoint."""

    def apply(saved):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(name):
    return lambda saved: os.truncate(saved / name, (saved / name).stat().st_size // 2)


NORM = "model.norm.weight"
DAMAGES = {
    "state cut": (cut("state.json"), "delete that folder"),
    "optimizer missing": (lambda saved: (saved / "optimizer-0.pt").unlink(), "optimizer-0.pt"),
    "optimizer cut": (cut("optimizer-0.pt"), "delete that folder"),
    "code": (lambda saved: torch.save(Code(), saved / "optimizer-0.pt"), "delete that folder"),
    "NaN": (change_weights(lambda t: t[NORM].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line(folder, monkeypatch, damage, words):
    """That names it. When it is deleted, the run continues from the one before."""
    monkeypatch.chdir(folder)
    newest = checkpoint.latest(folder)
    damage(newest)
    run = make_run(folder, seed=1)
    with pytest.raises(UserError) as caught:
        checkpoint.load(run, newest)
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    assert str(newest) in line or "the checkpoint has" in line
    assert not Path("executed").exists()
    shutil.rmtree(newest)
    assert checkpoint.load(run, checkpoint.latest(folder)) == 2
