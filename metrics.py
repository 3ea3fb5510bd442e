"""What a step's rollouts and selection were like, as the metrics of docs/metrics.md; over all ranks."""

import time

import torch
from torch import Tensor

import scope
from rollout import Rollout
from support import distributed


class Stopwatch:
    """Seconds by what they were spent on, as the metrics time/NAME."""

    def __init__(self):
        self.last, self.times = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + now - self.last
        self.last = now


def rollout_metrics(sampled: Rollout, rewards: Tensor, correct: Tensor, advantages: Tensor, group_size: int) -> dict:
    """Metrics of the step's rollouts, over all ranks; groups are whole on a rank."""
    columns = [rewards, correct.float(), advantages, sampled.lengths.float(), sampled.stopped.float()]
    rewards, correct, advantages, lengths, stopped = distributed.gather(torch.stack(columns, dim=1)).unbind(dim=1)
    entropy = distributed.gather(sampled.entropy[sampled.mask])
    groups = rewards.view(-1, group_size)
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/accuracy": correct.mean(),
        "group/frac_zero_std": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
        "advantage/min": advantages.min(),
        "advantage/max": advantages.max(),
        "length/mean": lengths.mean(),
        "length/frac_truncated": 1 - stopped.mean(),
        "entropy": entropy.mean(),
        "tokens": len(entropy),
    }
    return {name: float(value) for name, value in metrics.items()}


def selection_metrics(flat: dict[str, Tensor], config) -> dict[str, float]:
    """Which tokens were taken, over all ranks."""
    selected = flat["selected"]
    scores = scope.redistribution_score(flat["logprobs"].exp(), flat["advantages"])
    metrics = {
        "selection/fraction": selected.float().mean(),
        "selection/candidates": (scores > 0).float().mean(),
        "objective/fraction": flat["marked"].float().mean(),
    }
    if scope.STRATEGIES[config.selection.strategy].share is None:
        metrics["selection/shortfall"] = round(config.selection.fraction * len(selected)) - selected.sum()
    if "branching" in flat:
        metrics["selection/branching"] = flat["branching"].mean()  # tokens where a sibling goes another way
    if selected.any():
        metrics |= {
            "selection/p": flat["logprobs"][selected].exp().mean(),
            "selection/advantage": flat["advantages"][selected].mean(),
            "selection/negative": (flat["advantages"][selected] < 0).float().mean(),
            "selection/entropy": flat["entropy"][selected].mean(),
        }
    return {name: float(value) for name, value in metrics.items()}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates of a step that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
