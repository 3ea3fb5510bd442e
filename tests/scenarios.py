"""Steps 4-6 on made-up rewards, by any number of ranks."""

import torch
from helpers import VOCABULARY, config_of, run_of, tiny_model

from grpo import group_advantages
from rollout import rescore, sample
from train import select, update


def moved(policy):
    """Move the policy as if by an update, so that the ratios are no longer 1."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return policy


def made_up_prompts():
    """Return the prompts of 8 problems, each 4 times."""
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for i in range(8):
        prompts += [torch.randint(2, VOCABULARY, (3 + i % 4,), generator=generator).tolist()] * 4
    return prompts


def made_up_rollout(policy, rows, rewards_of, temperature=0.9):
    """Sample some of the 32 completions, with rewards; each third one is correct."""
    prompts = made_up_prompts()
    rollout = sample(
        policy,
        [prompts[row] for row in rows],
        rows,
        stop=[1, 5],
        max_new_tokens=16,
        temperature=temperature,
        seed=0,
        step=0,
    )
    rollout.advantages = group_advantages(rewards_of(rollout, rows), 4)
    rollout.correct = torch.tensor([row % 3 == 0 for row in rows])
    return rollout


def step_gradient(
    world, *arguments, rewards_of, strategy="scope", on_policy=True, reference_seed=1
):
    """Return which tokens of all ranks are selected [N], the gradient by name, and the metrics."""
    config = config_of(
        "prompts_per_step=8",
        "group_size=4",
        f"selection.strategy={strategy}",
        "selection.kl_coef=0.7",
        "selection.fraction=0.2",
        "logits_chunk=5",
        "temperature=0.9",
        "micro_batch_size=4",
        "optimizer.max_grad_norm=1e9",
        *arguments,
    )
    policy = tiny_model(seed=0).train()
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)  # of the step before
    reference = tiny_model(seed=reference_seed)  # another model, so that the penalty has a gradient
    run = run_of(policy, config, world=world, reference=reference)
    rollout = made_up_rollout(policy, list(world.slice(32)), rewards_of)
    current = rollout
    if not on_policy:
        current = rescore(moved(policy), rollout, config, world)
    rollout.selected, rollout.token_mask, metrics = select(current, rollout, config, world, seed=0)
    metrics |= update(run, rollout, on_policy=on_policy)
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters()}
    return world.gather(rollout.selected[rollout.mask]), gradient, metrics


def by_length(rollout, rows):
    return rollout.lengths.float() + torch.tensor([float(row % 3) for row in rows])


def only_first_half(rollout, rows):
    """Give all groups of rank 1 of 2 equal rewards: with `scope` that rank has nothing to add."""
    return by_length(rollout, rows) * torch.tensor([float(row < 16) for row in rows])


def all_wrong(rollout, rows):
    return torch.zeros(len(rows))


# Arguments of step_gradient. With 5 rows a micro-batch the ranks differ in their number of them.
SCENARIOS = {
    "mixed": (["micro_batch_size=5"], {"rewards_of": by_length}),
    "idle rank": (["micro_batch_size=3"], {"rewards_of": only_first_half}),
    "all wrong": ([], {"rewards_of": all_wrong}),
    "uniform": ([], {"rewards_of": only_first_half, "strategy": "uniform"}),
    "sequence": (["grpo.normaliser=sequence", "objective=div"], {"rewards_of": by_length}),
    "forking": (["objective=forking_rl"], {"rewards_of": by_length, "strategy": "covariance"}),
    "off-policy": (["objective=kl_cov"], {"rewards_of": by_length, "on_policy": False}),
}


def all_scenarios(world):
    """Run every scenario."""
    results = {}
    for name, (arguments, settings) in SCENARIOS.items():
        results[name] = step_gradient(world, *arguments, **settings)
    return results
