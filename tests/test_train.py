"""Tests of train.py as a run: schedule, metrics, kill and resume, and the command on four ranks."""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import ALONE, ROOT, SMALL, config_of, metrics_of, weights_of, write_jsonl
from transformers import AutoModelForCausalLM

import grpo
import train
from evaluate import EVALUATION_STEP, Evaluation, d_collapse
from rollout import Rollout
from support import models
from support.config import UserError, flatten, one_line_errors
from support.files import lock, read_jsonl


def test_learning_rate():
    def rates(*arguments, steps=10):
        config = config_of("optimizer.lr=2", f"steps={steps}", *arguments)
        return [train.learning_rate(step, config) for step in range(steps)]

    constant = rates("optimizer.schedule=constant", "optimizer.warmup=0.4")
    assert constant == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 6)
    cosine = [1 + math.cos(math.pi * step / 10) for step in range(10)]
    assert rates("optimizer.schedule=cosine", "optimizer.warmup=0") == pytest.approx(cosine)
    after_warmup = [1 + math.cos(math.pi * k / 7) for k in range(7)]
    assert rates("optimizer.schedule=cosine", "optimizer.warmup=0.29") == pytest.approx(
        [0.5, 1, 1.5, *after_warmup]
    )
    assert rates("optimizer.warmup=1", steps=1)[0] > 0


def test_metrics_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    values = torch.where(mask, torch.arange(12.0).view(4, 3), 0.0)
    stopped = torch.tensor([True, True, False, True])
    rollout = Rollout([[2]] * 4, mask.long(), mask, stopped, values, values, values, values)
    rollout.rewards = torch.tensor([2.0, 0, 1, 1])
    rollout.correct = rollout.rewards == 2
    rollout.advantages = grpo.group_advantages(rollout.rewards, 2)
    config = config_of("group_size=2", "selection.fraction=0.5")
    metrics = train.rollout_metrics(rollout, config, ALONE)
    assert metrics["reward/mean"] == 1
    assert metrics["reward/accuracy"] == 0.25
    assert metrics["group/frac_zero_std"] == 0.5
    assert metrics["length/mean"] == 2
    assert metrics["length/frac_truncated"] == 0.25
    assert metrics["tokens"] == 8
    assert metrics["entropy"] == (0 + 1 + 3 + 6 + 7 + 8 + 9 + 10) / 8

    tokens = {
        "logprobs": torch.log(torch.arange(1.0, 9) / 10),
        "entropy": torch.arange(8.0),
        "advantages": rollout.advantages.repeat_interleave(rollout.lengths),
    }
    selected = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]).bool()
    metrics = train.selection_metrics(tokens, selected, torch.zeros(8).bool())
    assert metrics["selection/fraction"] == metrics["selection/candidates"] == 0.25
    assert metrics["objective/fraction"] == 0
    assert metrics["selection/p"] == pytest.approx((0.1 + 0.3) / 2)
    assert metrics["selection/entropy"] == 1
    assert metrics["selection/negative"] == 0.5
    assert metrics["selection/advantage"] == pytest.approx(0, abs=1e-6)


def test_phases_of_a_step_are_timed(monkeypatch):
    """A phase that comes twice has the sum of its times."""
    times = iter([0, 1, 3, 7, 15])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    clock = train.Stopwatch()
    for name in ("rollout", "select", "update", "select"):
        clock.lap(name)
    assert clock.times == {"time/rollout": 1, "time/select": 2 + 8, "time/update": 4}


# ---------------------------------------------------------------- whole runs of a tiny toy model


def fail_in_step(patch, step):
    """Let the training loop fail at the start of this step."""
    draw_problems = train.draw_problems

    def draw(problems, number, *arguments):
        if number + 1 == step:
            raise ZeroDivisionError
        return draw_problems(problems, number, *arguments)

    patch.setattr(train, "draw_problems", draw)


def test_killed_and_resumed_is_the_unbroken_run(in_tmp, monkeypatch):
    """A run that is killed in step 4 continues from the checkpoint of step 2, bit for bit."""
    train.main([*SMALL, "name=complete"])
    rows = metrics_of("complete")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert any(row.get("kl/selected", 0) > 0 for row in rows)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail_in_step(patch, 4)
        train.main([*SMALL, "name=broken"])
    assert not (in_tmp / "runs" / "broken" / "model").exists()
    logged = metrics_of("broken")
    load_problems = train.data.load_problems

    def reversed_problems(config):
        problems, heldout = load_problems(config)
        return problems[::-1], heldout

    with monkeypatch.context() as patch:
        patch.setattr(train.data, "load_problems", reversed_problems)
        with pytest.raises(UserError, match="the training problems changed since the run"):
            train.main(["name=broken", "resume=true"])
    assert metrics_of("broken") == logged
    with lock(Path("runs/broken/lock")), pytest.raises(UserError, match="runs/broken is in use by"):
        train.main(["name=broken", "resume=true"])
    settings = Path("runs/broken/config.yaml").read_text()
    shutil.rmtree("runs/base-evaluations")  # the base model is evaluated again
    train.main(["name=broken", "resume=true", "keep=1", "micro_batch_size=100"])
    assert Path("runs/broken/config.yaml").read_text() == settings
    assert [path.name for path in Path("runs/broken/checkpoints").iterdir()] == ["step-000004"]
    assert metrics_of("broken") == rows
    for file in ("samples.jsonl", "evaluation.json"):
        texts = [Path("runs", name, file).read_text() for name in ("complete", "broken")]
        assert texts[0] == texts[1]
    for name, weight in weights_of("complete").items():
        assert torch.equal(weight, weights_of("broken")[name])
    with monkeypatch.context() as patch:
        patch.setattr(train, "set_up", None)
        train.main(["name=broken", "resume=true"])  # it is finished: nothing is left to do
    assert metrics_of("broken") == rows


def test_resume_before_the_first_checkpoint(in_tmp, monkeypatch):
    """resume=auto starts where there is no checkpoint, and resume=true says that there is none."""
    arguments = [*SMALL, "name=early", "steps=1", "resume=auto"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail_in_step(patch, 1)
        train.main(arguments)
    with pytest.raises(UserError, match="runs/early has no checkpoint yet"):
        train.main([*SMALL, "name=early", "steps=1", "resume=true"])
    train.main(arguments)
    assert [row["step"] for row in metrics_of("early")] == [0, 1, 1]
    assert yaml.safe_load(Path("runs/early/config.yaml").read_text())["resume"] is False


def test_the_schedule_the_samples_and_the_base_reach_the_run(in_tmp, monkeypatch, capsys):
    """Each update has the rate of its step; each file is compared with the base model."""
    rates = []
    evaluated = []
    results = {}
    seeds = []
    rollouts = []
    update, evaluate, select = train.update, train.evaluate, train.select

    def spy_update(run, rollout, *, on_policy):
        rates.append(run.optimizer.param_groups[0]["lr"])
        return update(run, rollout, on_policy=on_policy)

    def spy_evaluate(model, tokenizer, problems, *positional, samples, seed, **named):
        evaluated.append((len(problems), samples, seed))
        result = evaluate(
            model, tokenizer, problems, *positional, samples=samples, seed=seed, **named
        )
        results[len(problems)] = result
        return result

    def spy_select(current, rollout, config, world, seed):
        seeds.append(seed)
        rollouts.append(current)
        return select(current, rollout, config, world, seed)

    monkeypatch.setattr(train, "update", spy_update)
    monkeypatch.setattr(train, "evaluate", spy_evaluate)
    monkeypatch.setattr(train, "select", spy_select)
    problems = [{"numbers": [1, 2], "target": 3}, {"numbers": [2, 2], "target": 4}]
    write_jsonl(Path("mine.jsonl"), problems)
    settings = [*SMALL, "optimizer.lr=0.001", "optimizer.schedule=cosine", "reward=token_entropy"]
    arguments = [*settings, "evaluation.data=[auto,mine.jsonl]"]
    train.main([*arguments, "name=spied", "log_every=3"])
    samples = read_jsonl(Path("runs/spied/samples.jsonl"))
    assert [row["step"] for row in samples] == [1, 1, 3, 3]
    for sample, row in zip(samples, (0, 4, 0, 4)):  # of the first two problems
        assert sample["reward"] == rollouts[sample["step"] - 1].rewards[row].item()
    config = config_of(*settings)
    assert rates == [train.learning_rate(step, config) for step in range(4)]
    assert len(set(rates)) == 4
    seed = config.evaluation.seed
    both = [(3, 4, seed), (2, 4, seed)]
    assert evaluated == [*both, (3, 2, seed), *both]  # in between only the first file
    report = json.loads(Path("runs/spied/evaluation.json").read_text())
    first, *_, last = read_jsonl(Path("runs/spied/metrics.jsonl"))
    printed = capsys.readouterr().out
    assert re.search(r"\| +\| base +\| trained +\|", printed)
    stored = map(Evaluation.load, Path("runs/base-evaluations").glob("*.npz"))
    bases = {len(base.correct): base for base in stored}
    for file, count, prefix in (("auto", 3, "eval"), ("mine.jsonl", 2, "eval/mine.jsonl")):
        base, trained = bases[count].entropy, results[count].entropy
        collapse = d_collapse(base, trained)
        assert first[f"{prefix}/entropy"] == pytest.approx(base.mean(), rel=1e-5)
        assert last[f"{prefix}/entropy"] == pytest.approx(trained.mean(), rel=1e-5)
        assert last[f"{prefix}/d_collapse"] == pytest.approx(collapse, abs=1e-9)
        expected = {"base": (base.mean(), 0), "trained": (trained.mean(), collapse)}
        for model, values in expected.items():
            table = report[file][model]
            assert [table["entropy"][0], table["d_collapse"][0]] == pytest.approx(values, abs=1e-6)
        assert 0 != collapse != 1
        assert f"| entropy    | {base.mean():.3f} ± " in printed
    evaluated.clear()
    train.main([*arguments, "name=other", "seed=1", "steps=3"])
    assert {seed for _, _, seed in evaluated} == {seed}
    assert len(set(seeds)) == 7  # no random selection of one seed is that of another
    assert len(list(Path("runs/base-evaluations").iterdir())) == 2  # all seeds share it
    assert EVALUATION_STEP < 0  # no training step, so that no random number is used twice


def test_metrics_go_to_wandb_and_continue_under_one_id(in_tmp, monkeypatch):
    """A stand-in for the library sees the steps of the killed and of the resumed run."""
    logged = []
    starts = []

    def init(**arguments):
        starts.append(arguments)
        return SimpleNamespace(log=lambda row, step: logged.append((step, row)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__="found"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail_in_step(patch, 4)
        train.main([*SMALL, "name=tracked", "wandb=project"])
    train.main(["name=tracked", "resume=true"])
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["project"] == "project"
    assert [step for step, row in logged if "loss" in row] == [1, 2, 3, 3, 4]
    assert [step for step, row in logged if "eval/pass@1" in row] == [0, 2, 4]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["objective=ppo"], "objective=ppo: give one of grpo, "),
        (["reward=fun"], "reward=fun: give one of accuracy, "),
        (["selection.strategy=best"], "selection.strategy=best: give one of "),
        (["grader=none"], "grader=none: give one of exact, math_verify"),
        (["selection.kl_coef=0"], "selection.kl_coef=0"),
        (["temperature=0"], "temperature=0"),
        (
            ["prompts_per_step=6", "updates_per_rollout=4"],
            "prompts_per_step=6: give a multiple of 4",
        ),
        (["objective=div", "reward=token_entropy"], "it needs reward=accuracy"),
        (["model=runs/no/model"], "there is no such folder"),
        (["data=no.jsonl"], "no.jsonl cannot be read"),
        (["max_new_tokens=250"], "max_new_tokens=250: .* fit the model's context of 256"),
        (["wandb=project"], "pip install wandb"),
    ],
)
def test_mistakes_are_named_and_no_run_begins(in_tmp, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=words) as caught:
        train.main([*SMALL, "name=wrong", *arguments])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert [path.name for path in in_tmp.glob("runs/wrong/*")] in ([], ["lock"])


@pytest.mark.parametrize(
    "command, line",
    [
        ("train", "unknown key stepz: did you mean steps?"),
        (
            "evaluate",
            "stepz=3: evaluate.py does not use this setting; its own are "
            "data, problems, samples, show",
        ),
        ("toy", "python toy.py takes no arguments: it makes recipes/toy-base"),
    ],
)
def test_a_command_ends_a_mistake_with_one_line_and_code_2(
    in_tmp, monkeypatch, capsys, command, line
):
    monkeypatch.setattr("sys.argv", [f"{command}.py", "stepz=3"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(f"{ROOT}/{command}.py", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert not list(in_tmp.iterdir())


PLACES = {
    "rollout.prefill": "sampling: lower rollout.batch_size",
    "grpo.in_chunks": "rescoring: lower micro_batch_tokens",
    "scope.select_tokens": "the selection: start a new run with a lower prompts_per_step",
    "support.optimizer.MasterAdamW.step": "the update: lower micro_batch_tokens",
    "support.optimizer.MasterAdamW.shard": "saving a checkpoint: give offload=true",
    "support.models.set_stop": "loading: give offload=true",
}


def test_out_of_memory_is_one_line_that_names_the_place(in_tmp, monkeypatch, capsys):
    settings = ["updates_per_rollout=2", "steps=2", "evaluation.every=0", "save_every=1", "keep=2"]
    train.main([*SMALL, "name=large", *settings])
    saved = in_tmp / "runs/large/checkpoints/step-000001/model.safetensors"
    before = saved.read_bytes()
    shutil.rmtree("runs/large/checkpoints/step-000002")
    Path("runs/large/evaluation.json").unlink()

    def out_of_memory(*arguments, **named):
        raise torch.OutOfMemoryError

    for place, words in PLACES.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, out_of_memory)
            with pytest.raises(SystemExit) as caught, one_line_errors():
                train.main(["name=large", "resume=true"])
        assert caught.value.code == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: out of memory in {words}")
        assert saved.read_bytes() == before


def test_the_dry_run_prints_the_run_and_writes_nothing(in_tmp, capsys):
    train.main([*SMALL, "dry_run=true", "selection.fraction=0.25"])
    printed = capsys.readouterr().out
    for words in (
        "selection.fraction=0.25",
        "first prompt",
        "4 problems x 4 = 16 completions",
        "memory on each rank",
    ):
        assert words in printed
    assert not list(in_tmp.iterdir())


# ---------------------------------------------------------------- the real command

# An evaluation in between has 3 completions, so that the first of 4 ranks has none.
REAL = (
    SMALL
    + (
        "steps=2 prompts_per_step=8 toy.updates=30 reward=trajectory_likelihood "
        "updates_per_rollout=2 optimizer.lr=0.001 evaluation.every=1 evaluation.samples_between=1"
    ).split()
)


def test_real_runs(tmp_path, monkeypatch, capsys):
    """One process, four ranks on two "nodes" of this machine, and one from what four have saved."""
    monkeypatch.chdir(tmp_path)
    train.main([*REAL, "name=alone"])
    a_real_run_writes_everything(tmp_path / "runs" / "alone", capsys.readouterr().out)
    shutil.rmtree("runs/base-evaluations")  # so that the ranks evaluate the base model again
    torchrun = (
        f"-m torch.distributed.run --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d "
        # a free port could be taken before torchrun binds it
        f"--rdzv_conf=store_type=file --rdzv_endpoint={tmp_path}/nodes {ROOT}/train.py"
    )
    command = [sys.executable, *torchrun.split(), *REAL, "name=ranks"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    four_ranks_train_like_one(tmp_path / "runs")
    (tmp_path / "runs" / "ranks" / "evaluation.json").unlink()  # or the run would be finished
    train.main(["name=ranks", "resume=true"])
    four_ranks_train_like_one(tmp_path / "runs")


def a_real_run_writes_everything(folder, printed):
    names = "config.yaml metrics.jsonl samples.jsonl evaluation.json checkpoints model lock"
    assert {path.name for path in folder.iterdir()} == {*names.split()}
    settings = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    assert settings == flatten(config_of(*REAL, "name=alone"))
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    expected = (
        "reward/mean reward/accuracy group/frac_zero_std length/mean entropy tokens "
        "length/frac_truncated loss lr grad_norm clip_frac kl/selected kl_old selection/fraction "
        "selection/candidates logprob_drift mem_gb time/rollout time/select time/update"
    )
    assert {*expected.split()} <= rows[1].keys()
    assert "eval/pass@1" in rows[2]
    assert {"eval/acc@4", "eval/pass@4", "eval/entropy", "eval/d_collapse"} <= rows[-1].keys()
    page = (ROOT / "docs" / "metrics.md").read_text()
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
        for key in row.keys() - {"step"}:
            assert key.startswith("eval/") or f"`{key}`" in page, key
    table = json.loads((folder / "evaluation.json").read_text())["auto"]
    for row, model in ((rows[0], "base"), (rows[-1], "trained")):
        assert row["eval/pass@1"] == table[model]["pass@1"][0]
    samples = read_jsonl(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert samples[0].keys() == {"step", "prompt", "completion", "reward"}
    model, tokenizer = models.load(str(folder / "model"))
    assert models.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    for words in ("first prompt", "stop ids", "reward", "trained", "pass@4", "d_collapse"):
        assert words in printed
    assert "written to runs/alone" in printed


def four_ranks_train_like_one(runs):
    """Draws, selection, losses and weights are the same for any number of ranks."""
    alone = read_jsonl(runs / "alone" / "metrics.jsonl")
    ranks = read_jsonl(runs / "ranks" / "metrics.jsonl")
    for row, other in zip(alone, ranks, strict=True):
        for key, value in row.items():
            if not key.startswith("time/") and key != "mem_gb":
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    steps = [row for row in alone if "loss" in row]
    assert all(row["grad_norm"] > 1e-3 and row["kl_old"] > 0 for row in steps)
    assert steps[1]["kl/selected"] > 0
    (base,) = runs.glob("toy-base-*/")
    folders = (base, runs / "alone" / "model", runs / "ranks" / "model")
    before, one, four = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=2e-5)  # 2 % of lr
        assert (one[name] - before[name]).abs().max() > 1e-3  # training did change it
