"""Evaluation: Acc@n, Pass@k and d_collapse of a model on held-out problems, with standard errors over problems.

    python evaluate.py model=runs/countdown-scope-seed0/model samples=16
    torchrun --nproc_per_node=2 evaluate.py model=... data=problems.jsonl samples=128

Samples at the training temperature with nothing cut off (top-p 1, no top-k), by the same code and grader
as training. Correctness is a [P, n] table (P problems, n samples each); everything below is read off it.
"""

import sys

import config as configs

if __name__ == "__main__":  # before torch is imported: a typo is told at once
    with configs.one_line_errors():
        KEYS = configs.evaluation_keys(sys.argv[1:])

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import data
import distributed
import rollout
import toy

STEP = -1  # the `step` of every evaluation's draws: no training step has it, and all models face the same noise


def pass_at_k(num_samples, num_correct, k: int):
    """Probability that k of n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. (2021), as the product 1 - prod_{j=n-c+1..n} (1 - k/j), which
    cannot overflow. num_samples and num_correct are whole numbers or arrays of them; returns the same.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if k < 1 or (n < k).any():
        raise ValueError(f"k = {k} of {n.min()} samples: give 1 <= k <= the number of samples")
    if (c < 0).any() or (c > n).any():
        raise ValueError("num_correct must lie between 0 and num_samples")
    result = np.ones(n.shape)
    for i in np.ndindex(n.shape):
        if n[i] - c[i] >= k:
            result[i] = 1.0 - np.prod(1.0 - k / np.arange(n[i] - c[i] + 1, n[i] + 1))
    return float(result) if result.ndim == 0 else result


def d_collapse(base_entropy, entropy, *, fraction: float = 0.2) -> float:
    """Relative loss of forking tokens, 1 - f(model) / f(base); 0 for the base itself, 1 if none is left (Section 4.2).

    A forking token is one whose entropy exceeds h*, set so that `fraction` of the base model's tokens do.
    base_entropy and entropy are the token entropies of each model on its own rollouts, any two lengths.
    f(base) is counted, not assumed to be `fraction`: ties at h* would otherwise read as collapse.
    """
    base_entropy, entropy = np.asarray(base_entropy).ravel(), np.asarray(entropy).ravel()
    if not base_entropy.size or not entropy.size:
        raise ValueError("d_collapse needs at least one token of each model")
    threshold = np.quantile(base_entropy, 1 - fraction, method="inverted_cdf")
    forking = (base_entropy > threshold).mean()
    return float(1 - (entropy > threshold).mean() / forking) if forking else 0.0


@dataclass
class Evaluation:
    """n samples of each of P problems. Token entropies are flat, in nats."""

    correct: np.ndarray  # [P, n] bool
    lengths: np.ndarray  # [P, n] tokens
    stopped: np.ndarray  # [P, n] bool, False: truncated
    entropy: np.ndarray  # [tokens] float32

    def save(self, path) -> None:
        np.savez_compressed(path, **vars(self))

    @classmethod
    def load(cls, path) -> "Evaluation":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**arrays)

    def summary(self, base: "Evaluation | None" = None) -> dict[str, tuple[float, float | None]]:
        """Each figure with its standard error over problems (None where it has none), in the table's order."""
        problems, samples = self.correct.shape

        def over_problems(values):
            error = float(values.std(ddof=1) / problems**0.5) if problems > 1 else None
            return float(values.mean()), error

        first = self.correct[:, :16]
        figures = {f"acc@{first.shape[1]}": over_problems(first.mean(axis=1))}
        for k in (1, 4, 16, 64, 128):
            if k <= samples:
                figures[f"pass@{k}"] = over_problems(pass_at_k(samples, self.correct.sum(axis=1), k))
        figures["entropy"] = float(self.entropy.mean()), None
        if base is not None:
            figures["d_collapse"] = d_collapse(base.entropy, self.entropy), None
        figures["length"] = over_problems(self.lengths.mean(axis=1))
        figures["truncated"] = over_problems(1 - self.stopped.mean(axis=1))
        return figures


def evaluate(model, tokenizer, problems, world, config, *, samples: int, title: str) -> Evaluation:
    """Samples and grades `samples` completions of each problem, the rows shared out over ranks.

    Every rank returns the whole result, the same whatever the number of ranks.
    """
    prompts = rollout.encode_prompts(tokenizer, [data.render(problem, config.prompt) for problem in problems])
    rows = world.share(len(problems) * samples)
    with tqdm(total=len(rows), desc=title, unit="sample", leave=False, disable=not world.is_main) as bar:
        with world.autocast():
            sampled = rollout.sample(
                model, [prompts[row // samples] for row in rows], list(rows),
                stop=rollout.stop_ids(model, tokenizer), max_new_tokens=config.max_new_tokens,
                temperature=config.temperature, seed=config.seed, step=STEP,
                batch_size=config.rollout.batch_size, segment=config.rollout.segment, progress=bar.update,
            )  # fmt: skip
    texts = rollout.decode(tokenizer, sampled)
    verdicts = [data.is_correct(problems[row // samples], text) for row, text in zip(rows, texts)]
    correct = torch.tensor(verdicts, dtype=torch.bool, device=world.device) & sampled.stopped  # truncated: wrong
    columns = [correct.long(), sampled.lengths, sampled.stopped.long()]
    table = distributed.gather(torch.stack(columns, dim=1)).cpu().numpy()
    correct, lengths, stopped = table.T.reshape(3, len(problems), samples)
    entropy = distributed.gather(sampled.entropy[sampled.mask]).cpu().numpy()
    return Evaluation(correct.astype(bool), lengths, stopped.astype(bool), entropy)


def format_table(summaries: dict[str, dict]) -> str:
    """An aligned table, one line a model: value, and its standard error where it has one."""
    columns = list(dict.fromkeys(name for figures in summaries.values() for name in figures))

    def cell(figure):
        if figure is None:
            return "-"
        value, error = figure
        return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"

    lines = [["", *columns]]
    lines += [[label, *(cell(figures.get(name)) for name in columns)] for label, figures in summaries.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def describe(evaluation: Evaluation) -> str:
    """What a table's figures mean, n and k included."""
    problems, samples = evaluation.correct.shape
    return (f"{problems} held-out problems x {samples} samples; ± is the standard error over problems; "
            f"Pass@{samples} (k = n) is simply the share of problems solved at least once")


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    problems = data.heldout_problems(config.data, config.problems, vars(config.countdown))
    world = distributed.setup()
    try:
        model, tokenizer = rollout.load(toy.model_folder(config))
        result = evaluate(model.to(world.device), tokenizer, problems, world, config,
                          samples=config.samples, title="evaluation")  # fmt: skip
        if world.is_main:
            print(format_table({config.model: result.summary()}))
            print(describe(result))
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
