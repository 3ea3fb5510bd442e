"""Methods in whole steps and runs: every combination, later updates, RLIF without labels, what a reader adds."""

import json
import math
import re
import shutil
import subprocess
import sys
import zlib

import pytest
import torch
from helpers import ALONE, ROOT, SMALL, config_of, metrics_of, roll_out, tiny_model

import data
import grpo
import rewards
import rollout
import scope
import step as steps
import toy
import train
from support import config as configs
from support import models


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_later_updates_select_by_the_policy_as_it_is_then(in_tmp, monkeypatch):
    """train.py itself, two updates a step: fresh log-probabilities in the second, a fresh draw in each."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: "1" in text)
    select, seen = steps.select, []

    def spy(current, old_logprobs, advantages, config, seed):
        seen.append(((current.logprobs - old_logprobs).abs().max().item(), seed, len(advantages)))
        return select(current, old_logprobs, advantages, config, seed)

    monkeypatch.setattr(steps, "select", spy)
    words = ["steps=3", "grpo.updates_per_rollout=2", "name=two", "reward=token_entropy"]
    train.main(configs.training_keys([*SMALL, *words]))
    moved_by, seeds, rows = zip(*seen)
    assert len(set(seeds)) == 6 and set(rows) == {8}  # 4 problems x 4 completions in two parts
    assert all(m == 0 for m in moved_by[::2]) and all(m > 1e-4 for m in moved_by[1::2])


@pytest.mark.parametrize("reward", [name for name in rewards.REWARDS if not rewards.REWARDS[name].verifiable])
def test_rlif_uses_no_labels(in_tmp, monkeypatch, reward):
    """Other answers, the same training to the last bit; only the logged accuracy differs."""
    rows, weights = {}, {}
    for name, parity in (("right", 0), ("shuffled", 1)):  # labels that vary within a group
        monkeypatch.setattr(
            data, "is_correct", lambda _, text, grader, side=parity: zlib.crc32(text.encode()) % 2 == side)
        # Long enough for a good share of the random model's completions to stop: truncated ones count as wrong.
        train.main(configs.training_keys([*SMALL, "steps=2", "max_new_tokens=60", f"reward={reward}", f"name={name}"]))
        rows[name] = metrics_of(name)
        weights[name] = models.load(f"runs/{name}/model")[0].state_dict()
    for key, weight in weights["right"].items():
        assert torch.equal(weight, weights["shuffled"][key])
    for right, shuffled in zip(rows["right"], rows["shuffled"], strict=True):
        prefixes = ("eval/acc", "eval/pass", "eval/majority", "reward/accuracy")
        labelled = {key for key in right if key.startswith(prefixes)}
        assert {key: value for key, value in right.items() if key not in labelled} == {
            key: value for key, value in shuffled.items() if key not in labelled
        }
    labels = [[row.get("reward/accuracy", row.get("eval/pass@1")) for row in rows[name]] for name in rows]
    assert labels[0] != labels[1]
    assert rows["right"][-2]["kl/selected"] > 0  # it did train


# ---------------------------------------------------------------- all together


def test_rescored_record_is_the_current_policys():
    policy, config = tiny_model(), config_of("temperature=0.8", "micro_batch_size=3", "logits_chunk=4")
    sampled = rollout.sample(policy, [[2, 3], [4]] * 4, list(range(8)), stop=[1], max_new_tokens=9, temperature=0.8,
                             seed=0, step=0, collision=True)
    assert sampled.collision.abs().max() > 0.01
    same = rollout.rescore(policy, sampled, config, ALONE)
    for name in ("logprobs", "entropy", "collision"):
        torch.testing.assert_close(getattr(same, name), getattr(sampled, name), rtol=0, atol=1e-5)
    other = rollout.rescore(tiny_model(seed=5), sampled, config, ALONE)
    assert (other.logprobs - sampled.logprobs).abs().max() > 0.1
    assert (other.tokens == sampled.tokens).all() and (other.self_certainty == sampled.self_certainty).all()


TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, spread=0.5)


def two_steps(config, reference):
    """Two steps of two updates each, as train.py puts them together; yields the metrics of every update."""
    tokenizer, problems = toy.make_tokenizer(29), [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]
    policy = tiny_model(**TINY)
    objective = steps.MicroBatchLoss(policy, config, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        sampled, _, rewarded, correct = roll_out(policy, tokenizer, [1], problems, step, config, ALONE)
        advantages = grpo.group_advantages(rewarded, 2)
        for rows in (slice(0, 4), slice(4, 8)):
            own, on_policy = sampled[rows], rows.start == 0
            current = own if on_policy else rollout.rescore(policy, own, config, ALONE)
            selection = steps.select(current, own.logprobs, advantages[rows], config, seed=step)
            batches = steps.MicroBatches(own, advantages[rows], correct[rows], selection, reference, config, ALONE)
            metrics = steps.update(objective, optimizer, batches, selection, on_policy=on_policy, world=ALONE,
                                   max_grad_norm=1.0)
            yield metrics | train.selection_metrics(selection.flat, config)
    before = tiny_model(**TINY).get_input_embeddings().weight
    assert not torch.equal(policy.get_input_embeddings().weight, before)


@pytest.mark.parametrize("objective", grpo.OBJECTIVES)
def test_every_combination_trains(monkeypatch, objective):
    """Each objective with each strategy, and with accuracy and one other reward in turn: two steps on a tiny random
    model, finite throughout, and the weights move."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: len(text) % 3 == 0)
    for name, value in {"CLIP_COV_LOW": 0.01, "CLIP_COV_FRACTION": 0.2, "KL_COV_FRACTION": 0.2}.items():
        monkeypatch.setattr(grpo, name, value)
    reference = tiny_model(**TINY)
    others = [name for name in rewards.REWARDS if name != "accuracy"]
    for i, strategy in enumerate(scope.STRATEGIES, start=list(grpo.OBJECTIVES).index(objective)):
        for reward in ("accuracy", others[i % len(others)])[: 1 if objective == "div" else 2]:
            config = config_of(
                f"objective={objective}", f"selection.strategy={strategy}", f"reward={reward}", "prompts_per_step=4",
                "group_size=2", "max_new_tokens=4", "grpo.updates_per_rollout=2",
            )
            for metrics in two_steps(config, reference):
                assert all(math.isfinite(value) for value in metrics.values()), (objective, strategy, reward)


def test_kl_cov_with_one_update_says_so(in_tmp, capsys):
    train.main(configs.training_keys([*SMALL, "steps=1", "objective=kl_cov", "name=one"]))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "grpo.updates_per_rollout=2" in notes[0]
    train.main(configs.training_keys([*SMALL, "steps=1", "objective=kl_cov", "grpo.updates_per_rollout=2", "name=two"]))
    assert "note:" not in capsys.readouterr().err


def test_readmes_patch_adds_an_objective_a_strategy_and_a_reward(tmp_path):
    """As a reader would paste it; then a run with the three words, and what they make of the first step."""
    (patch,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for part in patch.split("--- a/")[1:]:  # in each file one function and one line
        added = [line[1:] for line in part.splitlines()[2:] if line.startswith("+")]
        assert sum(line.startswith("def ") for line in added) == 1 and not re.search("^-", part, re.MULTILINE)
        assert sum(line.startswith('    "') and line.endswith(",") for line in added) == 1 and len(added) <= 8
    for name in ("*.py", "config.yaml"):
        for file in ROOT.glob(name):
            shutil.copy(file, tmp_path)
    for room in ("support", "grading"):
        shutil.copytree(ROOT / room, tmp_path / room)
    (tmp_path / "change.patch").write_text(patch)
    subprocess.run(["git", "apply", "change.patch"], cwd=tmp_path, check=True)
    words = ["objective=cispo", "selection.strategy=rare", "reward=brevity", "max_new_tokens=60", "steps=2"]
    script = ("import data, sys, train; from support import config; "
              "data.is_correct = lambda problem, text, grader: '1' in text; "  # a random model solves nothing
              "train.main(config.training_keys(sys.argv[1:]))")
    subprocess.run([sys.executable, "-c", script, *SMALL, *words, "name=mine"], cwd=tmp_path, check=True,
                   capture_output=True, timeout=170)
    rows = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    first = rows[1]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert 0 < first["reward/mean"] < first["reward/accuracy"] and first["grad_norm"] > 0
    assert first["selection/fraction"] > 0 and first["selection/negative"] == 0
    assert rows[2]["kl/selected"] > 0
