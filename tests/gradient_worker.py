"""Steps 4-6 on made-up rewards, by as many ranks as torchrun starts: the mask and the gradient, saved by rank 0.

    torchrun --nproc_per_node=2 tests/gradient_worker.py FOLDER     (used by test_train.py)
"""

import sys
from pathlib import Path

import torch
from helpers import VOCABULARY, tiny_model

import grpo
import rollout
import step as steps
from support import config as configs
from support import distributed


def moved(policy):
    """The policy after some update: the ratios are no longer 1."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return policy


def little_memory(model, room: int) -> None:
    """Stands in for a device: more than `room` tokens at once do not fit, in the backward if there is one."""

    def out_of_memory(gradient):
        raise torch.OutOfMemoryError("made up")

    def check(module, arguments, output):
        hidden = output.last_hidden_state
        if hidden.shape[0] * hidden.shape[1] > room:
            hidden.register_hook(out_of_memory) if hidden.requires_grad else out_of_memory(None)

    model.base_model.register_forward_hook(check)


def step_gradient(world, *, rewards_of, micro_batch_size=4, logits_chunk=5, strategy="scope", more=(), on_policy=True,
                  room=0):
    """One update of 8 prompts x 4 completions: the selection of all ranks [N], the gradient by name, the metrics."""
    keys = configs.override(configs.read_defaults(), [
        "prompts_per_step=8", "group_size=4", f"selection.strategy={strategy}", "selection.kl_coef=0.7",
        "selection.fraction=0.2", f"logits_chunk={logits_chunk}", "temperature=0.9",
        f"micro_batch_size={micro_batch_size}", *more,
    ])
    config = configs.namespace(configs.nest(keys))
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)  # not equal: the penalty has a gradient
    policy.train()
    objective = steps.MicroBatchLoss(policy, config, world.size)
    if torch.distributed.is_initialized():
        objective = steps.in_ranks(objective, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, VOCABULARY, (3 + i % 4,), generator=generator).tolist() for i in range(8)]
    rows = list(world.share(32))
    sampled = rollout.sample(policy, [prompts[row // 4] for row in rows], rows, stop=[1, 5],
                             max_new_tokens=16, temperature=0.9, seed=0, step=0)
    advantages = grpo.group_advantages(rewards_of(sampled, rows), 4)
    correct = torch.tensor([row % 3 == 0 for row in rows])
    current = sampled if on_policy else rollout.rescore(moved(policy), sampled, config, world)
    selection = steps.select(current, sampled.logprobs, advantages, config, seed=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    batches = steps.MicroBatches(sampled, advantages, correct, selection, reference, config, world)
    if room and torch.distributed.is_initialized() and world.rank == world.size - 1:  # the others know nothing of it
        little_memory(policy, room), little_memory(reference, 2 * room)
    metrics = steps.update(objective, optimizer, batches, selection, on_policy=on_policy, world=world,
                           max_grad_norm=1e9)
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters()}
    return selection.flat["selected"], gradient, metrics


def by_length(sampled, rows):
    return sampled.lengths.float() + torch.tensor([float(row % 3) for row in rows])


def only_first_half(sampled, rows):
    """The groups of rank 1 of 2 all have equal rewards: with `scope` it has nothing to add."""
    return by_length(sampled, rows) * torch.tensor([float(row < 16) for row in rows])


def wrong(sampled, rows):
    return torch.zeros(len(rows))


SCENARIOS = {
    "mixed": {"rewards_of": by_length, "micro_batch_size": 5},  # ranks differ in their number of micro-batches
    "idle rank": {"rewards_of": only_first_half, "micro_batch_size": 3},
    "all wrong": {"rewards_of": wrong},
    "uniform": {"rewards_of": only_first_half, "strategy": "uniform"},
    "out of memory": {"rewards_of": by_length, "micro_batch_size": 16, "room": 50},
    "sequence": {"rewards_of": by_length, "more": ["grpo.normaliser=sequence", "objective=div"]},
    "forking": {"rewards_of": only_first_half, "more": ["objective=forking_rl"]},
}


if __name__ == "__main__":
    world = distributed.setup()
    results = {name: step_gradient(world, **settings) for name, settings in SCENARIOS.items()}
    if world.is_main:
        torch.save(results, Path(sys.argv[1]) / f"{world.size}.pt")
    distributed.shutdown()
