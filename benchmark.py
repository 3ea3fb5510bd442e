"""What selection costs: the time of a step with and without SCOPE's penalty, on the same rollouts.

    python benchmark.py                      # medians and their ratio, on the embedded default
    python benchmark.py steps=50 model=...   # any key of config.yaml

Each step's rollouts are drawn once and updated from by every strategy in turn, in alternating order, so that a
busy machine slows all of them alike. Weights stay as they are (learning rate 0): only time is measured.
"""

import copy
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import config as configs
import data
import distributed
import grpo
import rollout
import step as steps
import toy
import train

STRATEGIES = ("none", "scope", "all")


def main(keys: dict) -> None:
    train.check_words(keys)
    config = configs.namespace(configs.nest(keys))
    configs.require(config.grpo.updates_per_rollout == 1, "grpo.updates_per_rollout: the benchmark times one update")
    (problems, _, _), world = data.problem_sets(config), distributed.setup()
    policy, tokenizer = rollout.load(toy.model_folder(config.model, config))
    problems = steps.that_fit(policy.config, tokenizer, problems, config)
    policy.to(world.device).train()
    if config.gradient_checkpointing:
        rollout.recompute_layers(policy)
    stop = rollout.stop_ids(policy, tokenizer)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    objective = steps.Objective(policy, config, world.size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in ("rollout", *STRATEGIES)}

    for step in tqdm(range(config.steps + 1), desc="benchmark", unit="step"):
        started = clock(world)
        sampled, _, rewards, correct = steps.roll_out(policy, tokenizer, stop, problems, step, config, world)
        seconds["rollout"].append(clock(world) - started)
        advantages = grpo.group_advantages(rewards, config.group_size, eps=config.grpo.advantage_eps)
        for strategy in STRATEGIES if step % 2 else reversed(STRATEGIES):
            config.selection.strategy = strategy
            started = clock(world)
            selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=step)
            batches = steps.micro_batches(sampled, advantages, correct, selection, reference, config, world)
            steps.update(objective, optimizer, batches, selection, on_policy=True, world=world,
                         max_grad_norm=config.optimizer.max_grad_norm)  # fmt: skip
            seconds[strategy].append(clock(world) - started)

    median = {name: float(np.median(times[1:])) for name, times in seconds.items()}  # the first step warms up
    print(f"medians over {config.steps} steps on {world.device.type}: rollout and rewards {median['rollout']:.3f} s")
    for strategy in STRATEGIES:
        step_time = median["rollout"] + median[strategy]
        ratio = step_time / (median["rollout"] + median["none"])
        print(f"  {strategy:>6}: selection and update {median[strategy]:.3f} s, whole step {step_time:.3f} s, "
              f"{ratio:.3f} x none")
    distributed.shutdown()


def clock(world) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    with configs.one_line_errors():
        main(configs.training_keys(sys.argv[1:]))
