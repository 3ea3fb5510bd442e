"""The step and the run: gradients that do not depend on how a step is cut up, resume, and the real command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model
from gradient_worker import SCENARIOS, by_length, step_gradient, wrong
from transformers import AutoModelForCausalLM

import checkpoint
import config as configs
import grpo
import rollout
import scope
import train
from distributed import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--master_port=0", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0"]  # fmt: skip


def assert_same_gradient(a, b, tolerance=1e-6):
    """Relative to the size of the whole gradient."""
    size = math.sqrt(sum(g.double().pow(2).sum().item() for g in a.values()))
    difference = math.sqrt(sum((a[name].double() - b[name].double()).pow(2).sum().item() for name in a))
    assert size > 1e-3 and difference <= tolerance * size, difference / size


# ---------------------------------------------------------------- the gradient of a step


@pytest.fixture(scope="module")
def whole():
    return step_gradient(ALONE, rewards_of=by_length, micro_batch_size=100, logits_chunk=10_000)


@pytest.mark.parametrize("size, chunk", [(1, 1000), (3, 1000), (7, 3), (32, 1)])
def test_gradient_does_not_depend_on_the_cut(whole, size, chunk):
    chosen, gradient, figures = step_gradient(ALONE, rewards_of=by_length, micro_batch_size=size, logits_chunk=chunk)
    assert (chosen == whole[0]).all() and 0 < chosen.sum() < len(chosen)
    assert_same_gradient(whole[1], gradient)
    assert figures == pytest.approx(whole[2], rel=1e-4, abs=1e-7)


def test_gradient_against_a_naive_objective(whole):
    """Full logits, one row at a time, float64, straight from METHODS: -1/N sum A log p + lambda/K sum D."""
    policy, reference = tiny_model(seed=0).double(), tiny_model(seed=1).double()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 40, (3 + i % 4,), generator=generator).tolist() for i in range(8)]
    prompts = [prompt for prompt in prompts for _ in range(4)]
    sampled = rollout.sample(tiny_model(seed=0), prompts, list(range(32)), stop=[1, 5], max_new_tokens=16,
                             temperature=0.9, seed=0, step=0)  # fmt: skip
    advantages = grpo.group_advantages(by_length(sampled, range(32)), 4)
    rows = []
    for b, prompt in enumerate(prompts):
        length = int(sampled.lengths[b])
        ids = torch.tensor([prompt + sampled.tokens[b, :length].tolist()])
        logits = policy(ids).logits[0, len(prompt) - 1 : -1] / 0.9
        with torch.no_grad():
            reference_logits = reference(ids).logits[0, len(prompt) - 1 : -1] / 0.9
        logp, log_ref = torch.log_softmax(logits, -1), torch.log_softmax(reference_logits, -1)
        rows.append((logp[range(length), ids[0, len(prompt) :]], (logp.exp() * (logp - log_ref)).sum(-1)))
    N = sum(len(token) for token, _ in rows)
    scores = [(math.exp(x) * (1 - math.exp(x)) * max(advantages[b].item(), 0), b, t)
              for b, (token, _) in enumerate(rows) for t, x in enumerate(token.tolist())]  # fmt: skip
    best = [(b, t) for s, b, t in sorted(scores, reverse=True) if s > 0][: round(0.2 * N)]
    policy_term = -sum(advantages[b].item() * token.sum() for b, (token, _) in enumerate(rows)) / N
    penalty = sum(rows[b][1][t] for b, t in best) / len(best)
    (policy_term + 0.7 * penalty).backward()
    assert whole[0].nonzero().flatten().tolist() == sorted(sum(len(rows[i][0]) for i in range(b)) + t for b, t in best)
    assert_same_gradient({n: p.grad for n, p in policy.named_parameters()}, whole[1], 1e-5)
    assert whole[2]["kl/selected"] == pytest.approx(penalty.item(), rel=1e-4)


def test_first_scope_step_is_the_grpo_step():
    """Policy == reference: D = 0 with zero gradient, whatever lambda."""
    gradients = []
    for strategy in ("none", "scope"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradient_worker.tiny_model", lambda seed: tiny_model(seed=0))
            chosen, gradient, figures = step_gradient(ALONE, rewards_of=by_length, strategy=strategy, kl_coef=100.0)
        gradients.append(gradient)
    assert chosen.any() and abs(figures["kl/selected"]) < 1e-6
    assert_same_gradient(*gradients, tolerance=1e-4)  # 100 x the rounding of the KL's own gradient


def test_all_wrong_selects_nothing_and_moves_nothing():
    chosen, gradient, figures = step_gradient(ALONE, rewards_of=wrong)
    assert not chosen.any()
    assert all((g == 0).all() for g in gradient.values())
    assert figures["loss"] == 0 and figures["grad_norm"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_give_the_gradient_of_one_process(tmp_path, ranks):
    """Real gloo ranks under DDP, with unequal numbers of micro-batches, one rank idle, or nothing to learn at all."""
    subprocess.run([*TORCHRUN, f"--nproc_per_node={ranks}", ROOT / "tests" / "gradient_worker.py", tmp_path],
                   check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=170)  # fmt: skip
    together = torch.load(tmp_path / f"{ranks}.pt", weights_only=True)
    for name, settings in SCENARIOS.items():
        chosen, gradient, figures = step_gradient(ALONE, **settings)
        assert (together[name][0] == chosen).all(), name
        if name == "all wrong":
            assert all((g == 0).all() for g in together[name][1].values())
        else:
            assert_same_gradient(gradient, together[name][1])
        assert together[name][2] == pytest.approx(figures, rel=1e-4, abs=1e-7)


def test_rows_without_effect_are_left_out():
    """Rows of equal groups and without a selected token: exactly zero gradient, so no forward either."""
    policy = tiny_model()
    sampled = rollout.sample(policy, [[2, 3]] * 8, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    advantages = torch.tensor([0, 0, 0, 0, 1.0, -1.0, 0, 0])
    selected = torch.zeros_like(sampled.mask)
    selected[2, 0] = True
    batches = list(train.micro_batches(sampled, advantages, selected, policy, 2))
    assert sum(len(batch.tokens) for batch, _ in batches) == 3
    assert [is_last for _, is_last in batches] == [False, True]
    assert sum(len(batch.reference_hidden) for batch, _ in batches if batch.reference_hidden is not None) == 1


def test_a_bandit_learns_the_rewarded_token():
    """Weights move, and the right way: the token that pays becomes likelier, at every step."""
    policy = tiny_model(spread=0.5)
    config = configs.namespace(configs.nest(configs.read_defaults()))
    objective = train.Objective(policy, config, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    shares = []
    for step in range(8):
        sampled = rollout.sample(policy, [[2, 3]] * 64, list(range(64)), stop=[1], max_new_tokens=1, seed=0, step=step)
        rewards = (sampled.tokens[:, 0] % 4 == 3).float()
        advantages = grpo.group_advantages(rewards, 64)
        batches = train.micro_batches(sampled, advantages, torch.zeros_like(sampled.mask), None, 64)
        train.update(objective, optimizer, batches, num_tokens=64, num_selected=0, world=ALONE, max_grad_norm=1.0)
        with torch.no_grad():
            probs = torch.softmax(policy(torch.tensor([[2, 3]])).logits[0, -1], dim=0)
        shares.append(probs[3::4].sum().item())
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def test_a_gradient_that_is_not_finite_is_skipped():
    policy = tiny_model()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)

    class Broken(torch.nn.Module):
        def forward(self, batch, num_tokens, num_selected):
            return sum(p.sum() for p in policy.parameters()) * float("nan"), torch.zeros(4)

    train.update(Broken(), optimizer, [(None, True)], num_tokens=1, num_selected=0, world=ALONE, max_grad_norm=1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


# ---------------------------------------------------------------- schedule and order


def test_learning_rate():
    constant = [train.learning_rate(s, steps=10, lr=2.0, schedule="constant", warmup=0.4) for s in range(10)]
    assert constant == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 6)
    cosine = [train.learning_rate(s, steps=10, lr=2.0, schedule="cosine", warmup=0.0) for s in range(10)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * s / 10) for s in range(10)])
    assert train.learning_rate(0, steps=1, lr=2.0, schedule="cosine", warmup=1.0) > 0


def test_order_of_problems():
    """Every epoch holds each problem at most once, the remainder dropped; another epoch, another order."""
    epochs = [[p for s in range(3) for p in train.step_problems(list(range(10)), 3 * e + s, count=3, seed=0)]
              for e in range(3)]  # fmt: skip
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert train.step_problems(list(range(10)), 4, count=3, seed=0) == epochs[1][3:6]  # no state: any step, any time
    assert train.step_problems(list(range(10)), 4, count=3, seed=1) != epochs[1][3:6]


def test_step_metrics_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = grpo.group_advantages(rewards, 2)
    completions = torch.stack([rewards, advantages, torch.tensor([2.0, 1, 3, 2]), torch.tensor([1.0, 1, 0, 1])], dim=1)
    token_advantages = advantages.repeat_interleave(torch.tensor([2, 1, 3, 2]))
    tokens = torch.stack([torch.log(torch.full((8,), 0.25)), torch.arange(8.0), token_advantages], dim=1)
    chosen = torch.tensor([True, False, False, False, False, False, False, False])
    figures = train.step_metrics(completions, tokens, chosen, group_size=2)
    assert figures["reward/mean"] == 0.25 and figures["group/frac_zero_std"] == 0.5
    assert figures["length/mean"] == 2 and figures["length/frac_truncated"] == 0.25
    assert figures["tokens"] == 8 and figures["entropy"] == 3.5
    assert figures["selection/fraction"] == 0.125 and figures["selection/candidates"] == 0.25
    assert figures["selection/p"] == pytest.approx(0.25) and figures["selection/entropy"] == 0
    assert figures["selection/advantage"] == pytest.approx(0.7070, abs=1e-3)
    assert figures["advantage/min"] == -figures["advantage/max"] == pytest.approx(-0.7070, abs=1e-3)


# ---------------------------------------------------------------- whole runs, on a toy of a few weights

SMALL = ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=3", "toy.batch=8",
         "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "evaluation.problems=3", "evaluation.samples=4",
         "evaluation.samples_between=2", "evaluation.every=2", "log_every=1", "save_every=2", "steps=4",
         "countdown_problems=50", "selection.fraction=0.3", "optimizer.lr=0.01"]  # fmt: skip
TIMES = ("time/rollout", "time/select", "time/update", "mem_gb")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A working folder of its own, and a reward that a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.is_correct", lambda problem, text: "1" in text)
    return tmp_path


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def metrics_of(name):
    return [{key: value for key, value in row.items() if key not in TIMES}
            for row in read(f"runs/{name}/metrics.jsonl")]  # fmt: skip


def weights_of(name):
    return AutoModelForCausalLM.from_pretrained(Path("runs") / name / "model").state_dict()


@pytest.mark.parametrize("killed_in", ["the loop", "the save"])
def test_killed_and_resumed_is_the_unbroken_run(in_tmp, monkeypatch, killed_in):
    train.main(configs.training_keys([*SMALL, "name=whole"]))
    rows = metrics_of("whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4] and any(row.get("kl/selected", 0) > 0 for row in rows)

    with monkeypatch.context() as patch:
        if killed_in == "the loop":  # in step 4, after two steps were saved and three logged
            problems = train.step_problems
            patch.setattr(train, "step_problems",
                          lambda all, step, **kw: problems(all, step, **kw) if step < 3 else 1 / 0)  # fmt: skip
        else:  # between the two renames of the last save
            rename = Path.rename
            saved = []

            def stumble(path, target):
                if path.name == "checkpoint.tmp":
                    saved.append(path)
                    if len(saved) == 2:
                        raise ZeroDivisionError
                return rename(path, target)

            patch.setattr(Path, "rename", stumble)
        with pytest.raises(ZeroDivisionError):
            train.main(configs.training_keys([*SMALL, "name=broken"]))
    assert not (in_tmp / "runs" / "broken" / "model").exists()
    train.main(configs.training_keys([*SMALL, "name=broken", "resume=true"]))
    assert metrics_of("broken") == rows
    for name, weight in weights_of("whole").items():
        assert torch.equal(weight, weights_of("broken")[name])


def test_resume_before_the_first_save_starts_anew(in_tmp, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate, "evaluate", lambda *args, **kw: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(configs.training_keys([*SMALL, "name=early", "steps=1"]))
    train.main(configs.training_keys([*SMALL, "name=early", "steps=1", "resume=true"]))
    assert [row["step"] for row in metrics_of("early")] == [0, 1, 1]


def test_context_too_short_is_told_and_nothing_written(in_tmp):
    with pytest.raises(configs.UserError, match="max_new_tokens=250"):
        train.main(configs.training_keys([*SMALL, "name=long", "max_new_tokens=250"]))
    assert not (in_tmp / "runs" / "long").exists()


def test_replaced_folder_is_old_or_new(tmp_path):
    folder = tmp_path / "f"
    for content in ("old", "new"):
        with checkpoint.replaced(folder) as fresh:
            (fresh / "x").write_text(content)
    assert (folder / "x").read_text() == "new"
    with pytest.raises(ZeroDivisionError), checkpoint.replaced(folder) as fresh:
        (fresh / "x").write_text("half")
        raise ZeroDivisionError
    assert (folder / "x").read_text() == "new"


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """The real command, by one process and by two ranks; ranks also shard the optimizer."""
    cwd = tmp_path_factory.mktemp("runs")
    commands = {
        "alone": [sys.executable, ROOT / "train.py"],
        "ranks": [*TORCHRUN, "--nproc_per_node=2", ROOT / "train.py", "optimizer.zero=true"],
    }
    for name, command in commands.items():
        result = subprocess.run([*command, *SMALL, "steps=2", "toy.updates=30", f"name={name}"], cwd=cwd,
                                capture_output=True, text=True, timeout=170)  # fmt: skip
        assert result.returncode == 0, result.stderr
        (cwd / f"{name}.txt").write_text(result.stdout)
    return cwd


def test_a_real_run_writes_everything(real_runs):
    folder = real_runs / "runs" / "alone"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json", "base_evaluation.npz", "checkpoint",
        "model",
    }  # fmt: skip
    keys = configs.flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    assert keys == configs.override(configs.read_defaults(), [*SMALL, "steps=2", "toy.updates=30", "name=alone"])
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    expected = {"reward/mean", "group/frac_zero_std", "length/mean", "length/frac_truncated", "entropy", "loss", "lr",
                "grad_norm", "clip_frac", "tokens", "mem_gb", "selection/fraction", "selection/candidates",
                "kl/selected", "logprob_drift", *TIMES}  # fmt: skip
    assert expected <= rows[1].keys() and all(np.isfinite(value) for row in rows for value in row.values())
    assert {"eval/acc@4", "eval/pass@1", "eval/pass@4", "eval/entropy", "eval/d_collapse"} <= rows[-1].keys()
    samples = read(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert samples[0].keys() == {"step", "prompt", "completion", "reward"}
    model, tokenizer = rollout.load(str(folder / "model"))
    assert rollout.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    printed = (real_runs / "alone.txt").read_text()
    for word in ("first prompt", "stop ids", "reward", "trained", "pass@4", "d_collapse", "written to runs/alone"):
        assert word in printed


def test_two_ranks_train_like_one(real_runs):
    """The same draws, selection and losses, step for step, whatever the number of ranks; and the same weights."""
    alone, ranks = (read(real_runs / "runs" / name / "metrics.jsonl") for name in ("alone", "ranks"))
    for one, other in zip(alone, ranks, strict=True):
        for key in one.keys() - set(TIMES):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    one, other = (AutoModelForCausalLM.from_pretrained(real_runs / "runs" / name / "model").state_dict()
                  for name in ("alone", "ranks"))  # fmt: skip
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


def test_evaluate_command_on_a_trained_model(real_runs):
    arguments = ["model=runs/alone/model", "samples=8", "problems=3", "max_new_tokens=12"]
    outputs = []
    for launcher in ([sys.executable], [*TORCHRUN, "--nproc_per_node=2"]):
        result = subprocess.run([*launcher, ROOT / "evaluate.py", *arguments], cwd=real_runs, capture_output=True,
                                text=True, timeout=170)  # fmt: skip
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert "acc@8" in outputs[0] and "3 held-out problems x 8 samples" in outputs[0]
    assert outputs[0] == outputs[1]  # one rank or two: the same table


def test_scope_strategies_are_config_words():
    assert {"none", "uniform", "all", "scope"} <= scope.STRATEGIES.keys()
