"""Measure which tokens lower the entropy during training (Section 3.3).

    python -m paper.mechanism              # METHODS on SEEDS, to results/mechanism/
    python -m paper.mechanism steps=50     # other arguments go to every run

A policy-gradient update raises the logit of each sampled token in proportion to its advantage A. To
first order this changes the entropy H of its distribution in proportion to
-A (p (log p + H) - sum_v p_v^2 (log p_v + H)); see scope.entropy_change_score. This command trains
as train.py does and sums that over groups of tokens at every tenth step. A token *falls* by what it
takes from the entropy, and *rises* by what it adds. Runs that are in steps.jsonl are not repeated.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import scope
from evaluate import markdown_table
from paper.one_step import draw_step, train_step
from paper.reproduce import STUDIES, write_jsonl, write_toy_problems
from rollout import Rollout
from support.config import load_config, one_line_errors, show_help
from support.distributed import start
from support.files import read_jsonl, replace_text
from support.log import versions
from train import Run, set_up

SETTINGS = {"out": "results/mechanism"}
SEEDS = (0, 1, 2)
COMMON = "optimizer.lr=5e-5 optimizer.warmup=0.1 steps=200"
METHODS = {  # label -> overrides
    "GRPO": "selection.strategy=none",
    "SCOPE": "selection.strategy=scope selection.kl_coef=0.1",
    "GRPO, A > 0 only": "selection.strategy=none",
    "GRPO, A < 0 only": "selection.strategy=none",
}
EVERY = 10
P_LIMITS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)


def entropy_fall(rollout: Rollout) -> Tensor:
    """Return what each valid token takes from the entropy, to first order.  [N]

    It is negative where the update raises the entropy.
    """
    mask = rollout.mask
    return scope.entropy_change_score(
        rollout.logprobs[mask],
        rollout.entropy[mask],
        rollout.advantages[:, None].expand_as(mask)[mask],
        rollout.entropy_baseline[mask],
    )


def token_groups(rollout: Rollout, fall: Tensor) -> dict[str, Tensor]:
    """Return groups of the valid tokens, as masks.  bool [N]"""
    mask = rollout.mask
    probs = rollout.logprobs[mask].exp()
    advantages = rollout.advantages[:, None].expand_as(mask)[mask]
    scores = scope.redistribution_score(probs, advantages)

    def highest(values: Tensor, first: int, last: int) -> Tensor:
        """Mark the tokens from rank `first` to before `last`; only a value above 0 has a rank."""
        order = values.argsort(descending=True)[: int((values > 0).sum())]
        marked = torch.zeros_like(values, dtype=torch.bool)
        marked[order[first:last]] = True
        return marked

    budget = round(0.05 * len(scores))
    scored = int((scores > 0).sum())
    selected = highest(scores, 0, budget)
    groups = {
        "all": torch.ones_like(selected),
        "5 % with the largest fall": highest(fall, 0, budget),
        "5 % with the highest score": selected,
        "those of them that rise": selected & (fall < 0),
    }
    for i in range(10):
        limits = (scored * i // 10, scored * (i + 1) // 10)
        groups[f"score above 0, decile {i + 1}"] = highest(scores, *limits)
    for name, sign in (("A > 0", 1), ("A < 0", -1)):
        groups[name] = advantages * sign > 0
        for low, high in zip(P_LIMITS, P_LIMITS[1:]):
            inside = (probs > low) & (probs <= high)
            groups[f"{name}, {low:g} < p ≤ {high:g}"] = groups[name] & inside
    return groups


def measure(rollout: Rollout) -> dict[str, list[float]]:
    """Return for each group its share of the tokens, and its falls and rises over all falls."""
    fall = entropy_fall(rollout)
    total = fall.clamp(min=0).sum()
    if total == 0:  # all rewards of every group are equal
        return {}
    shares = {}
    for name, group in token_groups(rollout, fall).items():
        falls = fall[group].clamp(min=0).sum() / total
        rises = falls - fall[group].sum() / total
        shares[name] = [float(group.float().mean()), float(falls), float(rises)]
    return shares


def keep_sign(rollout: Rollout, method: str) -> None:
    """Set the advantages to 0 that a method does not learn from."""
    if method.endswith("A > 0 only"):
        rollout.advantages = rollout.advantages.clamp(min=0)
    if method.endswith("A < 0 only"):
        rollout.advantages = rollout.advantages.clamp(max=0)


def measure_run(run: Run, method: str, seed: int) -> list[dict]:
    """Train, and return a line for every tenth step."""
    lines = []
    for step in tqdm(range(run.config.steps), f"{method}, seed {seed}", disable=None):
        _, rollout = draw_step(run, step)
        if step % EVERY == 0:
            line = {"method": method, "seed": seed, "step": step, "commit": versions()["commit"]}
            line["accuracy"] = float(rollout.correct.float().mean())
            line["entropy"] = float(rollout.entropy[rollout.mask].mean())
            lines.append(line | {"shares": measure(rollout)})
        keep_sign(rollout, method)
        train_step(run, step, rollout)
    return lines


# ---------------------------------------------------------------- the page

HEAD = """# mechanism

Written by `python -m paper.mechanism`: means over seeds and the steps of the first and of the last
quarter of training. Falls and rises are in per cent of the sum of all falls.
"""


def table(lines: list[dict]) -> str:
    """Write a method's accuracy and entropy, and a line per group of tokens."""
    last = max(line["step"] for line in lines)
    quarters = [
        [line for line in lines if line["step"] <= last / 4],
        [line for line in lines if line["step"] >= 3 * last / 4],
    ]
    rows = []
    for name in ("accuracy", "entropy"):
        means = [np.mean([line[name] for line in quarter]) for quarter in quarters]
        rows.append([name, f"{means[0]:.3f}", "", "", f"{means[1]:.3f}", "", ""])
    groups = dict.fromkeys(name for line in lines for name in line["shares"])
    for name in groups:
        cells = []
        for quarter in quarters:
            shares = [line["shares"][name] for line in quarter if line["shares"]]
            cells += [f"{100 * share:.1f}" for share in np.mean(shares, axis=0)]
        rows.append([name, *cells])
    titles = [
        f"{name}, {part}" for part in ("first", "last") for name in ("tokens", "fall", "rise")
    ]
    return markdown_table(["", *titles], rows)


def page(lines: list[dict]) -> str:
    """Write table.md."""
    parts = [HEAD]
    for method in dict.fromkeys(line["method"] for line in lines):
        of_method = [line for line in lines if line["method"] == method]
        seeds = len({line["seed"] for line in of_method})
        parts.append(f"## {method}, {seeds} seeds\n\n{table(of_method)}")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    file = Path(load_config(arguments, SETTINGS).out) / "steps.jsonl"
    others = [a for a in arguments if a.partition("=")[0] not in SETTINGS]
    lines = read_jsonl(file)
    write_toy_problems(Path("runs/toy"))
    for seed in SEEDS:
        for method, overrides in METHODS.items():
            if any((line["method"], line["seed"]) == (method, seed) for line in lines):
                continue
            common = STUDIES["toy"].overrides.format(seed=seed)
            config = load_config(f"{common} {COMMON} {overrides}".split() + others)
            with start(config.precision) as world:
                lines += measure_run(set_up(config, world, Path("runs")), method, seed)
            write_jsonl(file, lines)
    replace_text(file.with_name("table.md"), page(lines))
    print(f"written: {file.with_name('table.md')}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
