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

import benchmark
import checkpoint
import config as configs
import grpo
import rollout
import step as steps
import toy
import train
from distributed import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


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
            chosen, gradient, figures = step_gradient(ALONE, rewards_of=by_length, strategy=strategy,
                                                      more=["selection.kl_coef=100.0"])  # fmt: skip
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
        assert together[name][2] == pytest.approx(figures, rel=1e-4, abs=1e-6)


def made_up_selection(sampled, selected=None):
    """A Selection of one rank with nothing marked."""
    selected = torch.zeros_like(sampled.mask) if selected is None else selected
    flat = {"selected": selected[sampled.mask], "marked": torch.zeros_like(sampled.mask)[sampled.mask]}
    return steps.Selection(selected, torch.zeros_like(sampled.mask), flat)


def config_of(*arguments):
    return configs.namespace(configs.nest(configs.override(configs.read_defaults(), list(arguments))))


def test_rows_without_effect_are_left_out():
    """Rows of equal groups and without a selected token: exactly zero gradient, so no forward either."""
    policy = tiny_model()
    sampled = rollout.sample(policy, [[2, 3]] * 8, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    advantages = torch.tensor([0, 0, 0, 0, 1.0, -1.0, 0, 0])
    correct = torch.tensor([True] + [False] * 7)
    selected = torch.zeros_like(sampled.mask)
    selected[2, 0] = True

    def rows(*arguments):
        config = config_of("micro_batch_size=2", *arguments)
        selection = made_up_selection(sampled, selected)
        return list(steps.micro_batches(sampled, advantages, correct, selection, policy, config, ALONE))

    batches = rows()
    assert sum(len(batch.tokens) for batch, _ in batches) == 3
    assert [is_last for _, is_last in batches] == [False, True]
    assert sum(len(batch.reference_hidden) for batch, _ in batches if batch.reference_hidden is not None) == 1
    assert sum(len(batch.tokens) for batch, _ in rows("objective=div")) == 4  # and the correct row
    marked = torch.zeros_like(sampled.mask)
    marked[7, 0] = True
    kl_cov = config_of("micro_batch_size=2", "objective=kl_cov")
    selection = steps.Selection(selected, marked, made_up_selection(sampled, selected).flat)
    batches = steps.micro_batches(sampled, advantages, correct, selection, policy, kl_cov, ALONE)
    assert sum(len(batch.tokens) for batch, _ in batches) == 4  # and the marked row
    for everywhere in ("grpo.kl_coef=0.1", "grpo.entropy_coef=0.1"):
        assert sum(len(batch.tokens) for batch, _ in rows(everywhere)) == 8


def test_a_bandit_learns_the_rewarded_token():
    """Weights move, and the right way: the token that pays becomes likelier, at every step."""
    policy, config = tiny_model(spread=0.5), config_of("micro_batch_size=64")
    objective = steps.Objective(policy, config, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    shares = []
    for step in range(8):
        sampled = rollout.sample(policy, [[2, 3]] * 64, list(range(64)), stop=[1], max_new_tokens=1, seed=0, step=step)
        rewards = (sampled.tokens[:, 0] % 4 == 3).float()
        advantages = grpo.group_advantages(rewards, 64)
        selection = made_up_selection(sampled)
        batches = steps.micro_batches(sampled, advantages, rewards > 0, selection, None, config, ALONE)
        steps.update(objective, optimizer, batches, selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
        with torch.no_grad():
            probs = torch.softmax(policy(torch.tensor([[2, 3]])).logits[0, -1], dim=0)
        shares.append(probs[3::4].sum().item())
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def test_a_gradient_that_is_not_finite_is_skipped():
    policy = tiny_model()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)

    class Broken(torch.nn.Module):
        def forward(self, *arguments):
            return sum(p.sum() for p in policy.parameters()) * float("nan"), torch.zeros(6)

    selection = steps.Selection(None, None, {"selected": torch.zeros(1, dtype=torch.bool)})
    steps.update(Broken(), optimizer, [(None, True)], selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


class Bf16World(World):
    """CUDA's autocast, tried on a CPU."""

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16)


def test_under_autocast_the_reference_rounds_like_the_policy():
    """Equal weights: D is 0 in bf16 too, so that the first SCOPE step is GRPO's on a GPU as well."""
    policy, world = tiny_model(), Bf16World(0, 1, torch.device("cpu"))
    config = config_of("selection.fraction=0.5", "micro_batch_size=3", "grpo.kl_coef=0.0")
    sampled = rollout.sample(policy, [[2, 3 + i] for i in range(8)], list(range(8)), stop=[1], max_new_tokens=6, seed=0,
                             step=0)  # fmt: skip
    advantages = grpo.group_advantages(torch.arange(8.0), 4)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=0)
    batches = steps.micro_batches(sampled, advantages, advantages > 0, selection, policy, config, world)
    objective, optimizer = steps.Objective(policy, config, 1), torch.optim.SGD(policy.parameters(), lr=0.0)
    figures = steps.update(objective, optimizer, batches, selection, on_policy=True, world=world, max_grad_norm=1.0)
    assert selection.selected.any() and figures["kl/selected"] == 0
    assert 1e-4 < figures["logprob_drift"] < 0.1  # it was bf16 indeed


def test_drift_is_a_mean_over_the_tokens_scored():
    """Two rows of eight are scored; each of their tokens is off by 0.5."""
    policy, config = tiny_model(), config_of()
    sampled = rollout.sample(policy, [[2, 3]] * 8, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    sampled.logprobs += 0.5
    advantages = torch.tensor([0, 0, 0, 0, 1.0, -1.0, 0, 0])
    selection = made_up_selection(sampled)
    batches = steps.micro_batches(sampled, advantages, advantages > 0, selection, None, config, ALONE)
    objective, optimizer = steps.Objective(policy, config, 1), torch.optim.SGD(policy.parameters(), lr=0.0)
    figures = steps.update(objective, optimizer, batches, selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
    assert figures["logprob_drift"] == pytest.approx(0.5, abs=1e-4)


def test_a_truncated_completion_earns_nothing(monkeypatch):
    """Also where the text up to the cut would count: in training and in evaluation."""
    monkeypatch.setattr("data.is_correct", lambda problem, text, grader: True)
    config = config_of("prompts_per_step=4", "max_new_tokens=6")
    policy, tokenizer = tiny_model(), toy.make_tokenizer(29)
    problems = [{"numbers": [i, 3], "target": 5} for i in range(4)]
    sampled, _, rewards, correct = steps.roll_out(policy, tokenizer, [1, 5], problems, 0, config, ALONE)
    assert 0 < sampled.stopped.sum() < 32
    assert (rewards == sampled.stopped.float()).all() and (correct == sampled.stopped).all()
    result = train.evaluate.evaluate(policy, tokenizer, problems, ALONE, config, samples=8, title="")
    assert 0 < result.stopped.sum() < 32 and (result.correct == result.stopped).all()


# ---------------------------------------------------------------- schedule and order


def test_learning_rate():
    constant = [train.learning_rate(s, steps=10, lr=2.0, schedule="constant", warmup=0.4) for s in range(10)]
    assert constant == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 6)
    cosine = [train.learning_rate(s, steps=10, lr=2.0, schedule="cosine", warmup=0.0) for s in range(10)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * s / 10) for s in range(10)])
    assert train.learning_rate(0, steps=1, lr=2.0, schedule="cosine", warmup=1.0) > 0


def test_order_of_problems():
    """Every epoch holds each problem at most once, the remainder dropped; another epoch, another order."""
    epochs = [[p for s in range(3) for p in steps.step_problems(list(range(10)), 3 * e + s, count=3, seed=0)]
              for e in range(3)]  # fmt: skip
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps.step_problems(list(range(10)), 4, count=3, seed=0) == epochs[1][3:6]  # no state: any step, any time
    assert steps.step_problems(list(range(10)), 4, count=3, seed=1) != epochs[1][3:6]


def test_metrics_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = grpo.group_advantages(rewards, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    record = torch.where(mask, torch.arange(12.0).view(4, 3), 0.0)
    sampled = rollout.Rollout([[2]] * 4, mask.long(), mask, torch.tensor([True, True, False, True]), record, record,
                              record, record)  # fmt: skip
    figures = steps.rollout_metrics(sampled, rewards, rewards > 0, advantages, group_size=2)
    assert figures["reward/mean"] == figures["reward/accuracy"] == 0.25 and figures["group/frac_zero_std"] == 0.5
    assert figures["length/mean"] == 2 and figures["length/frac_truncated"] == 0.25
    assert figures["tokens"] == 8 and figures["entropy"] == (0 + 1 + 3 + 6 + 7 + 8 + 9 + 10) / 8
    assert figures["advantage/min"] == -figures["advantage/max"] == pytest.approx(-0.7070, abs=1e-3)

    tokens = {
        "logprobs": torch.log(torch.full((8,), 0.25)), "entropy": torch.arange(8.0),
        "advantages": advantages.repeat_interleave(torch.tensor([2, 1, 3, 2])),
        "selected": torch.tensor([True, False, True, False, False, False, False, False]),
        "marked": torch.zeros(8, dtype=torch.bool),
    }  # fmt: skip
    figures = steps.selection_metrics(tokens, config_of("selection.fraction=0.5"))
    assert figures["selection/fraction"] == 0.25 and figures["selection/candidates"] == 0.25
    assert figures["selection/shortfall"] == 2 and figures["objective/marked"] == 0
    assert figures["selection/p"] == pytest.approx(0.25) and figures["selection/entropy"] == 1
    assert figures["selection/negative"] == 0.5 and figures["selection/advantage"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- whole runs, on a toy of a few weights

SMALL = ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=3", "toy.batch=8",
         "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "evaluation.problems=3", "evaluation.samples=4",
         "evaluation.samples_between=2", "evaluation.every=2", "log_every=1", "save_every=2", "steps=4",
         "countdown_problems=50", "selection.fraction=0.3", "optimizer.lr=0.01"]  # fmt: skip
REAL = [*SMALL, "steps=2", "toy.updates=30", "reward=trajectory_likelihood", "grpo.updates_per_rollout=2",
        "optimizer.lr=0.001"]  # fmt: skip
TIMES = ("time/rollout", "time/select", "time/update", "mem_gb")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A working folder of its own, and a reward that a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.is_correct", lambda problem, text, grader: "1" in text)
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
            problems = steps.step_problems
            patch.setattr(steps, "step_problems",
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
    train.main(configs.training_keys([*SMALL, "name=broken", "resume=true"]))  # nothing left to do: nothing twice
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
    commands["ranks again"] = [*commands["ranks"], "resume=true"]
    for name, command in commands.items():
        result = subprocess.run([*command, *REAL, f"name={name.split()[0]}"], cwd=cwd, capture_output=True, text=True,
                                timeout=170)  # fmt: skip
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
    assert keys == configs.override(configs.read_defaults(), [*REAL, "name=alone"])
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    expected = {"reward/mean", "group/frac_zero_std", "length/mean", "length/frac_truncated", "entropy", "loss", "lr",
                "grad_norm", "clip_frac", "tokens", "mem_gb", "selection/fraction", "selection/candidates",
                "kl/selected", "logprob_drift", "kl_old", "reward/accuracy", *TIMES}  # fmt: skip
    assert expected <= rows[1].keys() and all(np.isfinite(value) for row in rows for value in row.values())
    assert {"eval/acc@4", "eval/pass@1", "eval/pass@4", "eval/entropy", "eval/d_collapse"} <= rows[-1].keys()
    samples = read(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert samples[0].keys() == {"step", "prompt", "completion", "reward"}
    model, tokenizer = rollout.load(str(folder / "model"))
    assert rollout.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    readme = (ROOT / "README.md").read_text()
    for key in {key for row in rows for key in row if not key.startswith("eval/")} - {"step"}:
        assert f"`{key}`" in readme, key
    printed = (real_runs / "alone.txt").read_text()
    for word in ("first prompt", "stop ids", "reward", "trained", "pass@4", "d_collapse", "written to runs/alone"):
        assert word in printed


def test_two_ranks_train_like_one(real_runs):
    """The same draws, selection and losses, step for step, whatever the number of ranks; and the same weights."""
    alone, ranks = (read(real_runs / "runs" / name / "metrics.jsonl") for name in ("alone", "ranks"))
    for one, other in zip(alone, ranks, strict=True):
        for key in one.keys() - set(TIMES):
            assert one[key] == pytest.approx(other[key], rel=1e-2, abs=1e-5), key
    assert all(row["grad_norm"] > 1e-3 and row["kl_old"] > 0 for row in alone[1:-1]) and alone[2]["kl/selected"] > 0
    (base,) = (real_runs / "runs").glob("toy-base-*")
    folders = base, real_runs / "runs" / "alone" / "model", real_runs / "runs" / "ranks" / "model"
    before, one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
        assert (one[name] - before[name]).abs().max() > 1e-3  # and they did move


def test_benchmark_prints_a_ratio(in_tmp, capsys):
    benchmark.main(configs.training_keys([*SMALL, "steps=2"]))
    printed = capsys.readouterr().out
    assert all(f"{strategy:>6}: selection and update" in printed for strategy in benchmark.STRATEGIES)
    with pytest.raises(configs.UserError, match="objective=ppo"):
        benchmark.main(configs.training_keys([*SMALL, "objective=ppo"]))


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


