"""Evaluation: Acc@n, Pass@k, majority@k and d_collapse of models on held-out problems, compared with confidence.

    python evaluate.py model=runs/countdown-scope-seed0/model samples=128
    python evaluate.py "model=[runs/toy-base-7183f57f,runs/a/model]" data=problems.jsonl samples=256   # compared
    torchrun --nproc_per_node=4 evaluate.py model=... samples=128
    python evaluate.py plot=runs/a,runs/b                                                  # training curves

Samples at the training temperature with nothing cut off, by the code and the grader of training. Completions
are kept in evaluations/ as they come, so that a killed evaluation goes on where it stopped. P problems, n samples each.
"""

import sys

from support import config as configs
from support import help

if __name__ == "__main__":  # before torch is imported: a typo is reported at once
    with configs.one_line_errors():
        help.answer(sys.argv[1:], __doc__, configs.evaluation_keys(["model=toy"]))
        KEYS = configs.evaluation_keys(sys.argv[1:])

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import rollout
import step as steps
import toy
from support import distributed, models, plots
from support.files import file_name, fingerprint, replace_text
from support.plots import difference_table, format_table
from support.statistics import Estimate, difference

STEP = -1  # the `step` of every evaluation's draws: no training step has it, and all models face the same noise

# ---------------------------------------------------------------- metrics


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


def majority_at_k(answers, correct, k: int):
    """Chance that the most frequent of k answers is correct, each tied one counted for its share.  [P, n] -> [P]

    answers are numbers that name distinct answers within a problem. Averaged over the n // k disjoint blocks
    of k samples; what is left over is not used.
    """
    problems, blocks = len(answers), answers.shape[1] // k
    result = np.zeros(problems)
    for p in range(problems):
        for block in range(blocks):
            part = slice(block * k, (block + 1) * k)
            names, first, votes = np.unique(answers[p, part], return_index=True, return_counts=True)
            winners = first[votes == votes.max()]
            result[p] += correct[p, part][winners].mean() / blocks
    return result


def forking_threshold(base_entropy, fraction: float = 0.2) -> float:
    """h*: the entropy that `fraction` of the base model's tokens exceed."""
    return float(np.quantile(np.asarray(base_entropy).ravel(), 1 - fraction, method="inverted_cdf"))


def d_collapse(base_entropy, entropy, *, fraction: float = 0.2) -> float:
    """Relative loss of forking tokens, 1 - f(model) / f(base); 0 for the base itself, 1 if none is left (Section 4.2).

    A forking token is one whose entropy exceeds h*, set so that `fraction` of the base model's tokens do.
    base_entropy and entropy are the token entropies of each model on its own rollouts, any two lengths.
    f(base) is counted, not assumed to be `fraction`: ties at h* would otherwise read as collapse.
    """
    base_entropy, entropy = np.asarray(base_entropy).ravel(), np.asarray(entropy).ravel()
    if not base_entropy.size or not entropy.size:
        raise ValueError("d_collapse needs at least one token of each model")
    threshold = forking_threshold(base_entropy, fraction)
    forking = (base_entropy > threshold).mean()
    return float(1 - (entropy > threshold).mean() / forking) if forking else 0.0


@dataclass
class Evaluation:
    """n samples of each of P problems. Token entropies are flat, in nats, in the order of the completions."""

    correct: np.ndarray  # [P, n] bool
    answers: np.ndarray  # [P, n] numbers of the distinct answers of each problem
    lengths: np.ndarray  # [P, n] tokens
    stopped: np.ndarray  # [P, n] bool, False: truncated
    entropy: np.ndarray  # [tokens] float32

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")  # several runs may write one file
        np.savez_compressed(unfinished, **vars(self))
        unfinished.rename(path)

    @classmethod
    def load(cls, path) -> "Evaluation":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**arrays)

    def per_problem(self, token_values: np.ndarray) -> np.ndarray:
        """Sums of a flat token quantity over each problem's tokens.  [tokens] -> [P]"""
        ends = self.lengths.sum(axis=1).cumsum()
        totals = np.concatenate([[0.0], np.cumsum(token_values, dtype=np.float64)])
        return np.diff(totals[np.concatenate([[0], ends])])

    def metrics(self, ks, base: "Evaluation | None" = None, fixed_text: np.ndarray | None = None) -> dict:
        """Every metric, in the table's order. fixed_text: this model's token entropies on the base's completions."""
        (problems, samples), accurate = self.correct.shape, self.correct[:, :16]
        one, tokens = np.ones(problems), self.lengths.sum(axis=1).astype(float)
        metrics = {f"acc@{accurate.shape[1]}": Estimate(accurate.mean(axis=1), one)}
        for k in ks:
            metrics[f"pass@{k}"] = Estimate(pass_at_k(samples, self.correct.sum(axis=1), k), one)
        metrics[f"majority@{samples}"] = Estimate(majority_at_k(self.answers, self.correct, samples), one)
        metrics["distinct"] = Estimate(np.array([len(np.unique(row)) for row in self.answers], dtype=float), one)
        metrics["entropy"] = Estimate(self.per_problem(self.entropy), tokens)
        if base is not None:
            metrics["d_collapse"] = self.collapse(base, self.entropy, self)
        if fixed_text is not None:
            metrics["d_collapse fixed"] = self.collapse(base, fixed_text, base)
        metrics["length"] = Estimate(self.lengths.mean(axis=1), one)
        metrics["truncated"] = Estimate(1 - self.stopped.mean(axis=1), one)
        return metrics

    @staticmethod
    def collapse(base: "Evaluation", entropy: np.ndarray, text: "Evaluation") -> Estimate:
        """`d_collapse` as an Estimate; `text` is whose completions the entropies were taken on."""
        threshold = forking_threshold(base.entropy)
        share = (base.entropy > threshold).mean()
        scale = -1 / share if share else 0.0
        return Estimate(text.per_problem(entropy > threshold), text.lengths.sum(axis=1).astype(float),
                      offset=1.0 if share else 0.0, scale=float(scale))

    def summary(self, base: "Evaluation | None" = None, ks=(1, 4, 16, 64, 128)) -> dict[str, tuple]:
        """{metric: (value, standard error over problems)} for the k that there are samples for."""
        ks = [k for k in ks if k <= self.correct.shape[1]]
        return {name: (metric.value, metric.error) for name, metric in self.metrics(ks, base).items()}


# ---------------------------------------------------------------- sampling


def sample_and_grade(model, tokenizer, problems, prompts, rows, world, config, *, samples, seed, progress):
    """Rows (problem * samples + sample) drawn and graded: the rollout, correct [len(rows)] bool, and the texts."""
    with world.autocast():
        sampled = rollout.sample(
            model, [prompts[row // samples] for row in rows], list(rows), stop=models.stop_ids(model, tokenizer),
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed, step=STEP,
            batch_size=config.rollout.batch_size, segment=config.rollout.segment, progress=progress)
    asked = [problems[row // samples] for row in rows]
    return sampled, *steps.grade(tokenizer, asked, sampled, config.reward.grader)


def evaluate(model, tokenizer, problems, world, config, *, samples: int, title: str) -> Evaluation:
    """An evaluation during training: no completion is kept, and every rank returns all of them."""
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    rows = world.share(len(problems) * samples)
    with tqdm(total=len(rows), desc=title, unit="sample", leave=False, disable=world.no_bar) as bar:
        sampled, correct, texts = sample_and_grade(model, tokenizer, problems, prompts, rows, world, config,
                                                   samples=samples, seed=config.evaluation.seed, progress=bar.update)
    answers = [data.answer_of(problems[row // samples], text) for row, text in zip(rows, texts)]
    names = torch.tensor([zlib.crc32(answer.encode()) for answer in answers], dtype=torch.long, device=world.device)
    columns = [correct.long(), names, sampled.lengths, sampled.stopped.long()]
    table = distributed.gather(torch.stack(columns, dim=1)).cpu().numpy()
    correct, answers, lengths, stopped = table.T.reshape(4, len(problems), samples)
    entropy = distributed.gather(sampled.entropy[sampled.mask]).cpu().numpy()
    return Evaluation(correct.astype(bool), answers, lengths, stopped.astype(bool), entropy)


def complete(folder: Path, settings: dict, model, tokenizer, problems, world, config) -> Path:
    """completions.jsonl of one model on one problem file, drawn as far as it is not there yet.

    Rows go in chunks of several batches, each a file of its own once it is done: a kill loses the chunks in hand. A
    chunk is always the same rows together, so that a kill changes no byte, and the number of ranks no draw.
    """
    done = folder / "completions.jsonl"
    rows, batch = range(len(problems) * config.samples), config.rollout.batch_size
    size = max(batch, min(8 * batch, len(rows) // 8))  # long chunks wait less; of 8 and more each rank has its share
    chunks = [rows[first : first + size] for first in range(0, len(rows), size)]
    if done.is_file():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    models.check_lengths(model.config, prompts, config.max_new_tokens)
    mine = [i for i in range(len(chunks)) if i % world.size == world.rank]
    total = sum(len(chunks[i]) for i in mine)
    with tqdm(total=total, desc=folder.name, unit="sample", disable=world.no_bar) as bar:
        for i in mine:
            part = folder / f"part-{i:06d}.jsonl"
            if part.is_file():
                bar.update(len(chunks[i]))
                continue
            sampled, correct, texts = sample_and_grade(model, tokenizer, problems, prompts, chunks[i], world, config,
                                                       samples=config.samples, seed=config.seed, progress=bar.update)
            replace_text(part, completion_lines(chunks[i], sampled, texts, correct, config.samples))
    distributed.barrier()
    if world.is_main:
        parts = sorted(folder.glob("part-*.jsonl"))
        replace_text(done, json.dumps(settings) + "\n" + "".join(part.read_text() for part in parts))
        for part in parts:
            part.unlink()
    distributed.barrier()
    return done


def completion_lines(rows, sampled, texts, correct, samples: int) -> str:
    """One JSON object a completion; token ids and entropies (to 1e-5 nats) are what d_collapse is made of."""
    lines = []
    for i, (row, mask) in enumerate(zip(rows, sampled.mask)):
        entropies = [round(h, 5) for h in sampled.entropy[i][mask].tolist()]
        lines.append(json.dumps({
            "problem": row // samples, "sample": row % samples, "text": texts[i], "correct": bool(correct[i]),
            "length": len(entropies), "stopped": bool(sampled.stopped[i]),
            "entropy": round(sum(entropies) / len(entropies), 5), "tokens": sampled.tokens[i][mask].tolist(),
            "entropies": entropies,
        }) + "\n")
    return "".join(lines)


def read_completions(path: Path, problems: list) -> tuple[Evaluation, list[list[int]]]:
    """The evaluation and the completions' token ids, from a completions.jsonl; its first line holds the settings."""
    lines = path.read_text().splitlines()
    settings, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    shape = (-1, settings["samples"])

    def column(name):
        return np.array([row[name] for row in rows]).reshape(shape)

    answers = [data.answer_of(problems[row["problem"]], row["text"]) for row in rows]
    answers = np.array([zlib.crc32(answer.encode()) for answer in answers]).reshape(shape)
    entropy = np.array([h for row in rows for h in row["entropies"]], dtype=np.float32)
    evaluation = Evaluation(column("correct"), answers, column("length"), column("stopped"), entropy)
    return evaluation, [row["tokens"] for row in rows]


def entropy_on(model, tokenizer, problems, completions: list[list[int]], world, config) -> np.ndarray:
    """Token entropies of a model on given completions, flat: d_collapse without a shift of length or content."""
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    share, size, flat = world.share(len(completions)), config.rollout.batch_size, [torch.zeros(0, device=world.device)]
    for first in tqdm(range(share.start, share.stop, size), desc="entropy on the first model's text", unit="batch",
                      leave=False, disable=world.no_bar):
        rows = range(first, min(first + size, share.stop))
        given = rollout.from_completions([prompts[row // config.samples] for row in rows],
                                         [completions[row] for row in rows], world.device)
        scored = rollout.rescore(model, given, config, world)
        flat.append(scored.entropy[scored.mask])
    return distributed.gather(torch.cat(flat)).cpu().numpy()


# ---------------------------------------------------------------- the command


def describe(evaluation: Evaluation, largest_k: int, temperature: float) -> str:
    """What a table's numbers mean, n and k included."""
    problems, samples = evaluation.correct.shape
    text = f"{problems} held-out problems x {samples} samples at temperature {temperature:g}; ± is the standard error"
    return text + f"; Pass@{samples} (k = n) is the share of problems solved at least once" * (largest_k == samples)


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    if config.plot:
        runs = plots.read_metrics(configs.listed(config.plot))
        print(plots.picture(Path("training_curves.png"), lambda plot: plots.training_curves(plot, runs)))
        return
    ks = configs.ks(config.k, config.samples)
    names, files = configs.listed(config.model), configs.listed(config.data.file)
    problem_sets = [problems_of(file, config) for file in files]
    with distributed.joined(config.precision) as world:
        report = {file: compare(names, file, problems, ks, world, config)
                  for file, problems in zip(files, problem_sets)}
        if world.is_main:
            out = Path("evaluations") / "evaluation.json"
            replace_text(out, json.dumps(report, indent=1) + "\n")
            print(f"written: {out}, evaluations/*/completions.jsonl")
            print(plots.picture(Path("evaluations") / "pass_at_k.png", lambda plot: plots.pass_at_k(plot, report)))


def problems_of(file: str, config) -> list[dict]:
    """The first config.problems of a file; auto: Countdown problems from the held-out side of the split."""
    if file == "auto":
        return data.countdown(config.problems, heldout=True, **vars(config.countdown))
    problems, notes = data.evaluation_problems(config, file)
    configs.print_notes(notes)
    return problems[: config.problems]


def compare(names: list[str], file: str, problems: list, ks: list[int], world, config) -> dict:
    """Every model on one problem set: the table, and each further model against the first."""
    metrics, first, base, text = {}, None, None, None
    for name in names:
        path = toy.model_folder(name, config)
        configs.print_notes(configs.trained_otherwise(path, vars(config.prompt)))
        model, tokenizer = models.load(path, world.dtype)
        model.to(world.device)
        settings = {"model": path, "weights": fingerprint(path), "data": file, "prompt": vars(config.prompt),
                    "grader": config.reward.grader, "problems": zlib.crc32(json.dumps(problems).encode()),
                    "batch_size": config.rollout.batch_size, "precision": world.precision}
        settings |= {key: getattr(config, key) for key in ("seed", "max_new_tokens", "temperature", "samples")}
        label = zlib.crc32(json.dumps(settings).encode())
        folder = Path("evaluations") / f"{file_name(path)}--{file_name(file)}-{label:08x}"
        completions_file = complete(folder, settings, model, tokenizer, problems, world, config)
        evaluation, completions = read_completions(completions_file, problems)
        if first is None:
            first, base, text = tokenizer.get_vocab(), evaluation, completions
        fixed = None
        if len(names) > 1 and tokenizer.get_vocab() == first:  # another vocabulary cannot read the first's tokens
            fixed = entropy_on(model, tokenizer, problems, text, world, config)
        metrics[name] = evaluation.metrics(ks, base if len(names) > 1 else None, fixed)
    report = {name: {key: (metric.value, metric.error) for key, metric in own.items()}
              for name, own in metrics.items()}
    if world.is_main:
        print(f"\n{file}:\n{format_table(report)}\n{describe(evaluation, ks[-1], config.temperature)}")
    if world.is_main and len(names) > 1:
        reference, *others = names
        for name in others:
            report[name]["differences"] = {key: difference(metric, metrics[name][key])
                                           for key, metric in metrics[reference].items() if key in metrics[name]}
        print(f"\nless {reference}, problem by problem [95 % interval, paired bootstrap], * beyond noise:\n"
              + difference_table(list(metrics[reference]), {name: report[name]["differences"] for name in others}))
    return report


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
