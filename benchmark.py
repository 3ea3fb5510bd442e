"""What selection costs: the time of a step with and without SCOPE's penalty, on the same rollouts.

    python benchmark.py                      # medians and their ratio, on the embedded default
    python benchmark.py steps=50 model=...   # any key of config.yaml

Each step's rollouts are drawn once and updated from by every strategy in turn, in alternating order, so that a
busy machine slows all of them alike. Weights stay as they are (learning rate 0): only time is measured.
"""

import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import step as steps
from support import config as configs
from support import distributed

STRATEGIES = ("none", "scope", "all")


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    configs.require(config.grpo.updates_per_rollout == 1, "grpo.updates_per_rollout: the benchmark times one update")
    config.optimizer.lr = config.optimizer.weight_decay = 0.0
    config.selection.strategy = "scope"  # so that there is a reference model
    steps.check_methods(config)
    (problems, _, _), world = data.problem_sets(config), distributed.setup(config.precision)
    run = steps.set_up(config, problems, world)
    seconds: dict[str, list[float]] = {name: [] for name in ("rollout", *STRATEGIES)}

    for step in tqdm(range(config.steps + 1), desc="benchmark", unit="step"):
        started = clock(world)
        asked, rows = steps.draw_problems(run, step)
        sampled = steps.sample(run, asked, rows, step)
        rewards, correct, _ = steps.reward(run, asked, sampled)
        seconds["rollout"].append(clock(world) - started)
        advantages = grpo.group_advantages(rewards, config.group_size, eps=config.grpo.advantage_eps)
        for strategy in STRATEGIES if step % 2 else reversed(STRATEGIES):
            config.selection.strategy = strategy
            started = clock(world)
            selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=step)
            batches = steps.micro_batches(sampled, advantages, correct, selection, run.reference, config, world)
            steps.update(run.loss, run.optimizer, batches, selection, on_policy=True, world=world,
                         max_grad_norm=config.optimizer.max_grad_norm)
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
