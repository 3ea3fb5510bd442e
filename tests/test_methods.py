"""Methods in whole steps and runs: every one, later updates, RLIF without labels, and what
a reader adds.
"""

import math
import re
import zlib

import pytest
import torch
from helpers import ALONE, ROOT, SMALL, config_of, metrics_of, roll_out, run_of, tiny_model
from torch.testing import assert_close

import rewards
import train
from grpo import group_advantages, ratio
from objectives import OBJECTIVES, Objective
from rewards import REWARDS
from rollout import rescore, sample
from scope import STRATEGIES, Strategy
from support.models import load
from toy import make_tokenizer


def test_later_updates_select_by_the_policy_as_it_is_then(in_tmp, monkeypatch):
    """With two updates a step: fresh log-probabilities in the second, a fresh draw in each, and
    the mean of both in the metrics.
    """
    calls = []
    updates = []
    rescored = []

    def spy_rescore(policy, rollout, config, world):
        rescored.append(len(rollout.prompts))
        return rescore(policy, rollout, config, world)

    def spy(current, rollout, config, world, seed):
        change = (current.logprobs - rollout.logprobs).abs().max().item()
        calls.append((change, seed, len(rollout.advantages)))
        return select(current, rollout, config, world, seed)

    def spy_update(run, rollout, *, on_policy):
        updates.append(update(run, rollout, on_policy=on_policy))
        return updates[-1]

    select, update = train.select, train.update
    monkeypatch.setattr(train, "update", spy_update)
    monkeypatch.setattr(train, "rescore", spy_rescore)
    monkeypatch.setattr(train, "select", spy)
    settings = ["steps=3", "updates_per_rollout=2", "reward=token_entropy", "name=run"]
    train.main([*SMALL, *settings])
    changes, seeds, rows = zip(*calls)
    assert rescored == [16, 8] * 3  # the whole rollout before the first update
    assert len(set(seeds)) == 6
    assert set(rows) == {8}  # 4 problems x 4 completions in two parts
    assert all(change == 0 for change in changes[::2])
    assert all(change > 1e-4 for change in changes[1::2])
    rows = [row for row in metrics_of("run") if "loss" in row]
    for row, first, second in zip(rows, updates[::2], updates[1::2], strict=True):
        assert row["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert row["logprob_drift"] == first["logprob_drift"] < 1e-5
        assert row["kl_old"] == second["kl_old"] > 1e-6


def is_labelled(metric: str) -> bool:
    return metric.startswith(("eval/acc", "eval/pass", "reward/accuracy"))


def test_rlif_uses_no_labels(in_tmp, monkeypatch):
    """Other verdicts, the same training to the last bit; only the logged accuracy differs."""
    logged = []
    labels = []
    weights = []
    for parity in (0, 1):  # verdicts that vary within a group

        def grader(problem, text, name, parity=parity):
            return zlib.crc32(text.encode()) % 2 == parity

        monkeypatch.setattr("rewards.is_correct", grader)
        # With 60 tokens many completions of the random model stop; truncated ones count as wrong.
        settings = ["steps=2", "max_new_tokens=60", "reward=self_certainty"]
        train.main([*SMALL, *settings, f"name={parity}"])
        rows = metrics_of(str(parity))
        logged.append([{key: row[key] for key in row if not is_labelled(key)} for row in rows])
        labels.append([{key: row[key] for key in row if is_labelled(key)} for row in rows])
        weights.append(load(f"runs/{parity}/model")[0].state_dict())
    assert logged[0] == logged[1]
    assert labels[0] != labels[1]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert any(row.get("kl/selected", 0) > 0 for row in rows)  # it did train


# ---------------------------------------------------------------- all together


def test_a_rescored_rollout_is_that_of_the_current_policy():
    policy = tiny_model()
    config = config_of("temperature=0.8", "micro_batch_size=3", "logits_chunk=4")
    rollout = sample(
        policy,
        [[2, 3], [4]] * 4,
        list(range(8)),
        stop=[1],
        max_new_tokens=9,
        temperature=0.8,
        seed=0,
        step=0,
    )
    assert rollout.entropy_baseline.abs().max() > 0.01
    same = rescore(policy, rollout, config, ALONE)
    for name in ("logprobs", "entropy", "entropy_baseline"):
        assert_close(getattr(same, name), getattr(rollout, name), rtol=0, atol=1e-5)
    other = rescore(tiny_model(seed=5), rollout, config, ALONE)
    for name in ("logprobs", "entropy", "entropy_baseline"):
        assert (getattr(other, name) - getattr(rollout, name)).abs().max() > 0.01
    assert (other.tokens == rollout.tokens).all()


TINY = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, spread=0.5
)


def two_steps(config, reference):
    """Take two steps of two updates each, as train.py does; yield the metrics of every update."""
    problems = [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]
    tokenizer = make_tokenizer(29)
    policy = tiny_model(**TINY)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    run = run_of(policy, config, reference=reference, optimizer=optimizer)
    for step in range(2):
        rollout = roll_out(policy, tokenizer, list(range(1, 9)), problems, step, config)
        rollout.advantages = group_advantages(rollout.rewards, config.group_size)
        for i, part in enumerate(rollout.split(2)):
            current = rescore(policy, part, config, ALONE) if i > 0 else part
            part.selected, part.token_mask, metrics = train.select(
                current, part, config, ALONE, seed=step
            )
            yield metrics | train.update(run, part, on_policy=i == 0)
    before = tiny_model(**TINY).get_input_embeddings().weight
    assert not torch.equal(policy.get_input_embeddings().weight, before)


@pytest.mark.parametrize("i, strategy", list(enumerate(STRATEGIES)))
def test_every_method_trains(monkeypatch, i, strategy):
    """Each strategy with the objectives and rewards in turn: finite, and the weights move."""
    monkeypatch.setattr("rewards.is_correct", lambda problem, text, grader: len(text) % 3 == 0)
    for name in ("KL_COV_FRACTION", "CLIP_COV_FRACTION"):
        monkeypatch.setattr(f"objectives.{name}", 0.2)
    monkeypatch.setattr("objectives.CLIP_COV_RANGE", (0.01, 5.0))
    objective = list(OBJECTIVES)[i % len(OBJECTIVES)]
    reward = "accuracy"
    if not OBJECTIVES[objective].learns_from_correct:
        reward = list(REWARDS)[i // 2 % len(REWARDS)]
    config = config_of(
        f"objective={objective}",
        f"selection.strategy={strategy}",
        f"reward={reward}",
        "prompts_per_step=4",
        "group_size=2",
        "max_new_tokens=4",
        "updates_per_rollout=2",
    )
    train.check_methods(config)
    for metrics in two_steps(config, tiny_model(**TINY)):
        assert all(map(math.isfinite, metrics.values()))


def test_kl_cov_with_one_update_prints_a_note(capsys):
    train.check_methods(config_of("objective=kl_cov"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note:") and "updates_per_rollout=2" in line
    train.check_methods(config_of("objective=kl_cov", "updates_per_rollout=2"))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- what a reader adds


def cispo(logprobs, old_logprobs, batch, clip_low, clip_high):
    """Weight log p by the clipped ratio, which is a number without gradient.  MiniMax-M1 2025"""
    rho = ratio(logprobs, old_logprobs).clamp(1 - clip_low, 1 + clip_high).detach()
    return -batch.weight * rho * batch.advantages * logprobs


def test_an_objective_a_strategy_and_readmes_reward_are_one_entry_each(in_tmp, monkeypatch):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (block,) = [block for block in blocks if "REWARDS[" in block]
    monkeypatch.setitem(REWARDS, "brevity", None)  # so that it is removed afterwards
    exec(block, dict(vars(rewards)))  # as if appended to rewards.py
    monkeypatch.setitem(OBJECTIVES, "cispo", Objective(cispo))
    rare = Strategy(lambda tokens: tokens.advantages > 0, lambda tokens: -tokens.logprobs)
    monkeypatch.setitem(STRATEGIES, "rare", rare)
    train.main(
        [
            *SMALL,
            "objective=cispo",
            "selection.strategy=rare",
            "reward=brevity",
            "max_new_tokens=60",
            "steps=2",
            "name=mine",
        ]
    )
    rows = metrics_of("mine")
    for row in rows:
        assert all(map(math.isfinite, row.values()))
    steps = [row for row in rows if "reward/mean" in row]
    assert 0 < steps[0]["reward/mean"] < steps[0]["reward/accuracy"]
    assert steps[0]["grad_norm"] > 0
    assert steps[0]["selection/fraction"] > 0
    assert steps[0]["selection/negative"] == 0
    assert steps[1]["kl/selected"] > 0
