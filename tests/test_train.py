"""The run: schedule, metrics, kill and resume, and the real command on one rank and on two."""

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, SMALL, config_of, metrics_of
from transformers import AutoModelForCausalLM

import benchmark
import grpo
import rollout
import step as steps
import train
from support import config as configs
from support import models, runs
from support.files import replace_folder


def test_learning_rate():
    def rates(*words, steps=10):
        config = config_of("optimizer.lr=2", f"steps={steps}", *words)
        return [train.learning_rate(step, config) for step in range(steps)]

    constant = rates("optimizer.schedule=constant", "optimizer.warmup=0.4")
    assert constant == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 6)
    assert rates("optimizer.warmup=0.0") == pytest.approx([1 + math.cos(math.pi * s / 10) for s in range(10)])
    assert rates("optimizer.warmup=1.0", steps=1)[0] > 0


def test_metrics_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = grpo.group_advantages(rewards, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    record = torch.where(mask, torch.arange(12.0).view(4, 3), 0.0)
    sampled = rollout.Rollout([[2]] * 4, mask.long(), mask, torch.tensor([True, True, False, True]), record, record,
                              record, record)
    metrics = train.rollout_metrics(sampled, rewards, rewards > 0, advantages, group_size=2)
    assert metrics["reward/mean"] == metrics["reward/accuracy"] == 0.25 and metrics["group/frac_zero_std"] == 0.5
    assert metrics["length/mean"] == 2 and metrics["length/frac_truncated"] == 0.25
    assert metrics["tokens"] == 8 and metrics["entropy"] == (0 + 1 + 3 + 6 + 7 + 8 + 9 + 10) / 8
    assert metrics["advantage/min"] == -metrics["advantage/max"] == pytest.approx(-0.7070, abs=1e-3)

    tokens = {
        "logprobs": torch.log(torch.full((8,), 0.25)), "entropy": torch.arange(8.0),
        "advantages": advantages.repeat_interleave(torch.tensor([2, 1, 3, 2])),
        "selected": torch.tensor([True, False, True, False, False, False, False, False]),
        "marked": torch.zeros(8, dtype=torch.bool),
    }
    metrics = train.selection_metrics(tokens, config_of("selection.fraction=0.5"))
    assert metrics["selection/fraction"] == 0.25 and metrics["selection/candidates"] == 0.25
    assert metrics["selection/shortfall"] == 2 and metrics["objective/fraction"] == 0
    assert metrics["selection/p"] == pytest.approx(0.25) and metrics["selection/entropy"] == 1
    assert metrics["selection/negative"] == 0.5 and metrics["selection/advantage"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- whole runs, on a toy of a few weights

REAL = [*SMALL, "steps=2", "prompts_per_step=8", "toy.updates=30", "reward=trajectory_likelihood",
        "grpo.updates_per_rollout=2", "optimizer.lr=0.001",
        "evaluation.every=1", "evaluation.samples_between=1"]  # 3 completions: the first of 4 ranks has none


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def weights_of(name):
    return AutoModelForCausalLM.from_pretrained(Path("runs") / name / "model").state_dict()


@pytest.mark.parametrize("killed_in", ["the loop", "the save"])
def test_killed_and_resumed_is_the_unbroken_run(in_tmp, monkeypatch, capsys, killed_in):
    train.main(configs.training_keys([*SMALL, "name=whole"]))
    rows = metrics_of("whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4] and any(row.get("kl/selected", 0) > 0 for row in rows)

    with monkeypatch.context() as patch:
        if killed_in == "the loop":  # in step 4, after two steps were saved and three logged
            problems = steps.step_problems
            patch.setattr(steps, "step_problems",
                          lambda all, step, **kw: problems(all, step, **kw) if step < 3 else 1 / 0)
        else:  # before the last save takes effect
            rename = Path.rename
            patch.setattr(Path, "rename",
                          lambda path, target: 1 / 0 if path.name == "step-000004.tmp" else rename(path, target))
        with pytest.raises(ZeroDivisionError):
            train.main(configs.training_keys([*SMALL, "name=broken"]))
    assert not (in_tmp / "runs" / "broken" / "model").exists()
    logged, problem_sets = metrics_of("broken"), train.data.problem_sets
    with monkeypatch.context() as patch, pytest.raises(configs.UserError, match="began, the training problems changed"):
        patch.setattr(train.data, "problem_sets",
                      lambda config: (problem_sets(config)[0][::-1], *problem_sets(config)[1:]))
        train.main(configs.training_keys([*SMALL, "name=broken", "resume=true"]))
    assert metrics_of("broken") == logged
    shutil.rmtree("runs/base-evaluations")
    os.truncate("runs/broken/base_evaluation/auto.npz", 100)  # drawn again, of the base model
    capsys.readouterr()
    train.main(configs.training_keys([*SMALL, "name=broken", "resume=true"]))
    assert "auto.npz is damaged: made again" in capsys.readouterr().err
    assert metrics_of("broken") == rows
    with monkeypatch.context() as patch:
        patch.setattr(steps, "set_up", None)
        train.main(configs.training_keys(["name=broken", "resume=true"]))  # nothing left to do
    assert metrics_of("broken") == rows
    for name, weight in weights_of("whole").items():
        assert torch.equal(weight, weights_of("broken")[name])


def test_a_run_goes_on_by_its_name_and_may_take_more_steps(in_tmp):
    """Its own settings are taken; of other words all are named; under a constant rate steps= may be raised."""
    words = [*SMALL, "optimizer.schedule=constant", "optimizer.warmup=0.5", "evaluation.every=0"]
    train.main(configs.training_keys([*words, "name=longer", "steps=2"]))
    with pytest.raises(configs.UserError, match="optimizer.lr=0.01, not 0.5, seed=0, not 1; leave"):
        train.main(configs.training_keys(["name=longer", "resume=true", "seed=1", "optimizer.lr=0.5"]))
    train.main(configs.training_keys(["name=longer", "resume=true", "steps=4"]))
    train.main(configs.training_keys([*words, "name=whole", "steps=4", "optimizer.warmup=0.25"]))
    longer, whole = ([row for row in metrics_of(name) if "loss" in row] for name in ("longer", "whole"))
    assert longer == whole and len(whole) == 4
    with pytest.raises(configs.UserError, match="steps=4, not 3"):
        train.main(configs.training_keys(["name=longer", "resume=true", "steps=3"]))
    train.main(configs.training_keys([*SMALL, "name=cosine", "steps=2"]))
    with pytest.raises(configs.UserError, match="more steps need optimizer.schedule=constant"):
        train.main(configs.training_keys(["name=cosine", "resume=true", "steps=3"]))


@pytest.mark.parametrize("words, name", [
    ([], "countdown-scope-seed0"), (["selection.strategy=none", "seed=3"], "countdown-none-seed3"),
    (["optimizer.lr=3e-5", "steps=50", "log_every=1"], "countdown-scope-seed0-steps50-lr3e-05"),
    (["grpo.kl_coef=0.1"], "countdown-scope-seed0-grpo.kl_coef0.1"), (["toy.lr=1"], "countdown-scope-seed0-toy.lr1"),
    (["recipe=mine.yaml", "data=a/b.jsonl", "steps=9"], "m-a-b-token_entropy-scope-seed0-steps9"),
    (["prompt.countdown={numbers} {target}" + 60 * "x"], "countdown-scope-seed0-countdown_numbers_target_" + "x" * 43)])
def test_runs_are_named_by_what_differs(tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: m\nreward: token_entropy\nmax_new_tokens: 7\n")
    known = configs.read_defaults()
    found = runs.auto_name(configs.override(known | configs.recipe_keys(words, known), words))
    assert found == name or name.endswith("x") and found.startswith(name + "-") and len(found) <= 100


def test_the_schedule_the_samples_and_the_base_reach_the_run(in_tmp, monkeypatch):
    """Each update takes the rate of its step; evaluations in between are smaller; the table compares with the base."""
    rates, sizes, seeds, update, evaluate, select = [], [], [], steps.update, train.evaluate.evaluate, steps.select

    def spy(loss, optimizer, *arguments, **named):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(loss, optimizer, *arguments, **named)

    def count(*arguments, samples, title):
        sizes.append(samples)
        return evaluate(*arguments, samples=samples, title=title)

    monkeypatch.setattr(steps, "update", spy)
    monkeypatch.setattr(train.evaluate, "evaluate", count)
    monkeypatch.setattr(steps, "select", lambda *arguments: seeds.append(arguments[-1]) or select(*arguments))
    train.main(configs.training_keys([*SMALL, "name=spied", "log_every=3"]))
    assert [row["step"] for row in read(Path("runs/spied/samples.jsonl"))] == [1, 1, 3, 3]
    config = config_of(*SMALL)
    assert rates == [train.learning_rate(step, config) for step in range(4)] and len(set(rates)) == 4
    assert sizes == [4, 2, 4]  # before, in between, after
    table = json.loads(Path("runs/spied/evaluation.json").read_text())["auto"]
    assert table["base"]["d_collapse"][0] == pytest.approx(0, abs=1e-9) and table["base"] != table["trained"]
    train.main(configs.training_keys([*SMALL, "name=other", "seed=7", "steps=3"]))
    assert len(set(seeds)) == 7 and sizes[3:] == [2, 4]  # random selections follow the seed; the base's is shared
    assert train.evaluate.completions.STEP < 0  # no step of training, so none of its draws
    base = train.evaluate.Evaluation.load("runs/spied/base_evaluation/auto.npz")
    assert table["base"]["entropy"][0] == pytest.approx(base.entropy.mean(), rel=1e-5)


def test_resume_before_the_first_save_starts_anew(in_tmp, monkeypatch):
    """And resume=auto starts where there is no run, and goes on where there is one."""
    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate, "evaluate", lambda *args, **kw: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(configs.training_keys([*SMALL, "name=early", "steps=1", "resume=auto"]))
    train.main(configs.training_keys([*SMALL, "name=early", "steps=1", "resume=auto"]))
    assert [row["step"] for row in metrics_of("early")] == [0, 1, 1]
    assert configs.read_stored(Path("runs/early/config.yaml"))["resume"] is False


def test_metrics_and_samples_go_to_trackers_and_on_under_one_id(in_tmp, monkeypatch):
    """Stand-ins for the two libraries; a resumed run has the id of the killed one, and purges what it does again."""
    seen, writers = [], []

    class Tracked:
        def log(self, row, step):
            seen.append((step, set(row)))

        def finish(self):
            seen.append("finished")

    def init(**words):
        seen.append(words)
        return Tracked()

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            writers.append((folder, purge_step, []))

        def add_scalar(self, key, value, step):
            writers[-1][2].append((key, step))

        def add_text(self, key, text, step):
            writers[-1][2].append((key, step))

        def close(self):
            writers[-1][2].append("closed")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=lambda columns, data: (columns, data)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    words = [*SMALL, "name=tracked", "log.wandb=project", "log.tensorboard=true"]
    problems = steps.step_problems
    with monkeypatch.context() as patch:
        patch.setattr(steps, "step_problems", lambda all, step, **kw: problems(all, step, **kw) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(configs.training_keys(words))
    train.main(configs.training_keys([*words, "resume=true"]))
    begun = [entry for entry in seen if isinstance(entry, dict)]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["project"] == "project" and begun[1]["resume"] == "allow"
    logged = [entry for entry in seen if isinstance(entry, tuple)]
    assert {step for step, keys in logged if "loss" in keys} == {1, 2, 3, 4} and seen[-1] == "finished"
    assert {step for step, keys in logged if "eval/pass@1" in keys} == {0, 2, 4} and (1, {"samples"}) in logged
    (_, first, _), (folder, second, rows) = writers
    assert (first, second) == (1, 3) and folder == "runs/tracked/tensorboard" and rows[-1] == "closed"
    assert ("loss", 3) in rows and ("samples", 4) in rows and ("loss", 2) not in rows


def test_context_too_short_is_told_and_nothing_written(in_tmp):
    with pytest.raises(configs.UserError, match="max_new_tokens=250"):
        train.main(configs.training_keys([*SMALL, "name=long", "max_new_tokens=250"]))
    assert not (in_tmp / "runs" / "long").exists()


def test_replaced_folder_is_old_or_new(tmp_path):
    folder = tmp_path / "f"
    for content in ("old", "new"):
        with replace_folder(folder) as fresh:
            (fresh / "x").write_text(content)
    assert (folder / "x").read_text() == "new"
    with pytest.raises(ZeroDivisionError), replace_folder(folder) as fresh:
        (fresh / "x").write_text("half")
        raise ZeroDivisionError
    assert (folder / "x").read_text() == "new"


def test_real_runs(tmp_path):
    """The real command, by one process and by four ranks on two "nodes" of this machine. One test: runs take long."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
    alone = [sys.executable, ROOT / "train.py"]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
            meeting, ROOT / "train.py"]
    for name, commands in {"alone": [alone], "ranks": [node, node],
                           "ranks again": [[*alone, "resume=true"]]}.items():  # one process, from what four have saved
        words = [*REAL, f"name={name.split()[0]}"]
        if name == "ranks again":
            (tmp_path / "runs" / "ranks" / "evaluation.json").unlink()  # or it would be finished
        started = [subprocess.Popen([*command, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True) for command in commands]
        told = [process.communicate(timeout=170) for process in started]
        assert [process.returncode for process in started] == [0] * len(started), told
        (tmp_path / f"{name}.txt").write_text(told[0][0])
    a_real_run_writes_everything(tmp_path)
    four_ranks_train_like_one(tmp_path)


def a_real_run_writes_everything(real_runs):
    folder = real_runs / "runs" / "alone"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json", "base_evaluation", "checkpoints",
        "model",
    }
    keys = configs.flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    assert keys == configs.override(configs.read_defaults(), [*REAL, "name=alone"])
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2] and "eval/pass@1" in rows[2]
    expected = {"reward/mean", "group/frac_zero_std", "length/mean", "length/frac_truncated", "entropy", "loss", "lr",
                "grad_norm", "clip_frac", "tokens", "mem_gb", "selection/fraction", "selection/candidates",
                "kl/selected", "logprob_drift", "kl_old", "reward/accuracy", "time/rollout", "time/select",
                "time/update"}
    assert expected <= rows[1].keys() and all(np.isfinite(value) for row in rows for value in row.values())
    assert {"eval/acc@4", "eval/pass@1", "eval/pass@4", "eval/entropy", "eval/d_collapse"} <= rows[-1].keys()
    table = json.loads((folder / "evaluation.json").read_text())["auto"]
    for row, who in ((rows[0], "base"), (rows[-1], "trained")):
        assert [row["eval/pass@1"], row["eval/pass@1_stderr"]] == table[who]["pass@1"]
    samples = read(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert samples[0].keys() == {"step", "prompt", "completion", "reward"}
    model, tokenizer = models.load(str(folder / "model"))
    assert models.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    page = (ROOT / "docs" / "metrics.md").read_text()
    for key in {key for row in rows for key in row if not key.startswith("eval/")} - {"step"}:
        assert f"`{key}`" in page, key
    printed = (real_runs / "alone.txt").read_text()
    for word in ("first prompt", "stop ids", "reward", "trained", "pass@4", "d_collapse", "written to runs/alone"):
        assert word in printed


def four_ranks_train_like_one(real_runs):
    """The same draws, selection and losses, step for step, whatever the number of ranks; and the same weights."""
    alone, ranks = (read(real_runs / "runs" / name / "metrics.jsonl") for name in ("alone", "ranks"))
    for one, other in zip(alone, ranks, strict=True):
        for key in [key for key in one if not key.startswith("time/") and key != "mem_gb"]:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    taken = [row for row in alone if "loss" in row]
    assert all(row["grad_norm"] > 1e-3 and row["kl_old"] > 0 for row in taken) and taken[1]["kl/selected"] > 0
    (base,) = (real_runs / "runs").glob("toy-base-*")
    folders = base, real_runs / "runs" / "alone" / "model", real_runs / "runs" / "ranks" / "model"
    before, one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
        assert (one[name] - before[name]).abs().max() > 1e-3  # and they did move


def test_benchmark_prints_a_ratio(in_tmp, capsys):
    benchmark.main("step", configs.training_keys([*SMALL, "steps=2"]))
    printed = capsys.readouterr().out
    assert all(f"{strategy:>6}: selection and update" in printed for strategy in benchmark.STRATEGIES)
    with pytest.raises(configs.UserError, match="objective=ppo"):
        benchmark.main("step", configs.training_keys([*SMALL, "objective=ppo"]))
    with pytest.raises(configs.UserError, match="give one of step, memory, rollout, peer"):
        benchmark.main("speed", {})
    ways = [benchmark.measured_update(way, 64, vocabulary=300)[2] for way in ("chunks", "full logits")]
    assert ways[0] == pytest.approx(ways[1], rel=1e-5) and ways[0] > 0.01  # what is compared has one gradient



