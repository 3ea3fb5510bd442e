"""Evaluation: Acc@n, Pass@k, majority@k and d_collapse of models on held-out problems, compared with confidence.

    python evaluate.py model=runs/countdown-scope-seed0/model samples=128
    python evaluate.py "model=[toy,runs/a/model]" data=problems.jsonl samples=256 show=3    # compared, and looked at
    python evaluate.py recipe=runs/a/config.yaml model=runs/a/model "data=[gsm8k,math500,amc]" problems=1319
    torchrun --nproc_per_node=4 evaluate.py model=... samples=128

Samples at the training temperature with nothing cut off, by the code and the grader of training. Completions
are kept in evaluations/ as they come (completions.py), so that a killed evaluation goes on where it stopped.
P problems, n samples each.

model and data: one, or several as [a,b]. problems: the first so many of each file. k: those of Pass@k, as [1,8,64].
show: so many problems with completions, best and worst. out: a name for the results.
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
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import completions
import data
import toy
from completions import Completions
from support import distributed, models, plots
from support.files import file_name, replace_text, sync, written
from support.processes import versions
from support.statistics import Estimate, average, difference
from support.tables import difference_table, format_table

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
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several runs may write one file
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **vars(self))
            sync(unfinished)
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


def evaluate(model, tokenizer, problems, world, config, *, samples: int, title: str) -> Evaluation:
    """An evaluation during training: no completion is kept, and every rank returns all of them."""
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    rows = world.share(len(problems) * samples)
    with tqdm(total=len(rows), desc=title, unit="sample", leave=False, disable=world.no_bar) as bar:
        sampled, correct, texts = completions.sample_and_grade(
            model, tokenizer, problems, prompts, rows, world, config, samples=samples, seed=config.evaluation.seed,
            progress=bar.update)
    answers = [data.answer_of(problems[row // samples], text, config.reward.grader) for row, text in zip(rows, texts)]
    names = torch.tensor([zlib.crc32(answer.encode()) for answer in answers], dtype=torch.long, device=world.device)
    columns = [correct.long(), names, sampled.lengths, sampled.stopped.long()]
    table = distributed.gather(torch.stack(columns, dim=1)).cpu().numpy()
    correct, answers, lengths, stopped = table.T.reshape(4, len(problems), samples)
    entropy = distributed.gather(sampled.entropy[sampled.mask]).cpu().numpy()
    return Evaluation(correct.astype(bool), answers, lengths, stopped.astype(bool), entropy)


def of_completions(kept: Completions, grader: str) -> Evaluation:
    answers = [data.answer_of(kept.problems[row["problem"]], row["text"], grader) for row in kept.rows]
    names = np.array([zlib.crc32(answer.encode()) for answer in answers]).reshape(-1, kept.samples)
    entropy = np.concatenate([row["entropies"] for row in kept.rows])
    return Evaluation(kept.column("correct"), names, kept.column("length"), kept.column("stopped"), entropy)


# ---------------------------------------------------------------- the command


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    ks, names = configs.ks(config.k, config.samples), configs.listed(config.model)
    settings = {key: value for key, value in keys.items() if key not in ("out", "show", "recipe")}
    check_result(config.out, settings)
    problem_sets = {file: problems_of(file, config) for file in configs.listed(config.data.file)}
    with distributed.joined(config.precision) as world:
        found = {file: compare(names, file, problems, ks, world, config) for file, problems in problem_sets.items()}
        if world.is_main:
            metrics, kept = ({file: pair[i] for file, pair in found.items()} for i in (0, 1))
            report = print_report(metrics, kept, ks, config)
            write_results(config.out, settings, report, kept)


def problems_of(file: str, config) -> list[dict]:
    """The first config.problems of a file; auto: Countdown problems from the held-out side of the split."""
    if file == "auto":
        return data.countdown(config.problems, heldout=True, **vars(config.countdown))
    problems, notes = data.problems_of(config, file)
    notes += [f"{file}: the first {config.problems} of {len(problems)} problems"] * (len(problems) > config.problems)
    configs.print_notes(notes)
    return problems[: config.problems]


def compare(names: list[str], file: str, problems: list, ks: list[int], world, config) -> tuple[dict, dict]:
    """Every model on one problem set: {model: {metric: Estimate}}, and {model: its completions}."""
    metrics, kept, vocabulary, base = {}, {}, None, None
    for name in names:
        path = toy.model_folder(name, config)
        configs.print_notes(configs.trained_otherwise(path, vars(config.prompt)))
        model, tokenizer = models.load(path, world.dtype)
        model.to(world.device)
        kept[name] = completions.draw(path, file, model, tokenizer, problems, world, config)
        evaluation, fixed = of_completions(kept[name], config.reward.grader), None
        if base is None:
            vocabulary, base = tokenizer.get_vocab(), evaluation
        if len(names) > 1 and tokenizer.get_vocab() == vocabulary:  # another one cannot read the first's tokens
            own = completions.entropy_on(model, tokenizer, kept[names[0]], world, config)
            fixed = distributed.gather(own).cpu().numpy().round(5)  # as kept ones are: ties at the threshold stay ties
        metrics[name] = evaluation.metrics(ks, base if len(names) > 1 else None, fixed)
    for own in kept.values():
        own.drop_tokens()
    return metrics, kept


def results(sets: list[dict[str, dict[str, Estimate]]]) -> dict:
    """{model: {metric: (value, standard error)}}, means over problem sets; of each further model the "differences" from
    the first too: {metric: (value, low, high)}. A metric that one set or model lacks is left out."""
    report, first = {}, next(iter(sets[0]))
    for name in sets[0]:
        shared = [metric for metric in sets[0][name] if all(metric in own[name] for own in sets)]
        report[name] = {metric: average([own[name][metric] for own in sets]) for metric in shared}
        if name != first:
            report[name]["differences"] = {
                metric: difference(*zip(*((own[first][metric], own[name][metric]) for own in sets)))
                for metric in shared if all(metric in own[first] for own in sets)}
    return report


def describe(problems: int, samples: int, largest_k: int, temperature: float) -> str:
    """What a table's numbers mean, n and k included."""
    text = f"{problems} held-out problems x {samples} samples at temperature {temperature:g}; ± is the standard error"
    return text + f"; Pass@{samples} (k = n) is the share of problems solved at least once" * (largest_k == samples)


def print_report(metrics: dict, kept: dict, ks: list[int], config) -> dict:
    """Prints the tables of each problem set, the average last, and returns their figures."""
    report = {file: results([own]) for file, own in metrics.items()}
    for file, completed in kept.items():
        print_tables(file, report[file])
        problems = len(next(iter(completed.values())).problems)
        print(describe(problems, config.samples, ks[-1], config.temperature))
        for name, own in completed.items():
            show(name, own, config.show)
    if len(report) > 1:
        report["average"] = results(list(metrics.values()))
        print_tables(f"average of {len(metrics)} problem sets", report["average"])
        names = list(report["average"])
        accuracy = next(iter(report["average"][names[0]]))
        table = {name: {file: own[name][accuracy] for file, own in report.items()} for name in names}
        print(f"\n{accuracy}:\n{format_table(table)}")
    return report


def print_tables(title: str, found: dict) -> None:
    first, *others = found
    tables = {name: {metric: own[metric] for metric in own if metric != "differences"} for name, own in found.items()}
    print(f"\n{title}:\n{format_table(tables)}")
    if others:
        print(f"\nless {first}, problem by problem [95 % interval, paired bootstrap], * beyond noise:\n"
              + difference_table(list(tables[first]), {name: found[name]["differences"] for name in others}))


def show(name: str, kept: Completions, count: int) -> None:
    """The problems that most samples solve, and those that fewest do, with a right and a wrong completion."""
    order = np.argsort(-kept.column("correct").sum(axis=1), kind="stable").tolist()
    for problem in dict.fromkeys(order[:count] + order[len(order) - count :] if count else []):
        rows = kept.of(problem)
        print(f"\n{name}, problem {problem}: {sum(row['correct'] for row in rows)} of {kept.samples} right\n  "
              + json.dumps(kept.problems[problem], ensure_ascii=False))
        for word, verdict in (("right", True), ("wrong", False)):
            example = next((row["text"] for row in rows if row["correct"] == verdict), None)
            if example is not None:
                print(f"  {word}: {example.strip()}")


def check_result(out: str, settings: dict) -> None:
    """Refuses a name under which other results stand."""
    stored = Path("evaluations") / f"{out}.json"
    same = out == "auto" or not stored.is_file()
    with suppress(ValueError, KeyError, TypeError):  # no result of ours: not to be overwritten either
        same = same or json.loads(stored.read_text())["settings"] == settings
    configs.require(same, f"out={out}: {stored} holds something else; give another name, or delete that file")


def write_results(out: str, settings: dict, report: dict, kept: dict) -> None:
    """evaluations/OUT.json with date, versions and settings, OUT.problems.jsonl with correct counts, and OUT.png."""
    if out == "auto":
        words = [*(plots.short_name(name) for name in configs.listed(settings["model"])), "on",
                 *configs.listed(settings["data.file"])]
        out = f"{file_name('-'.join(words))[:80]}-{zlib.crc32(json.dumps(settings).encode()):08x}"
    folder = Path("evaluations")
    lines = [json.dumps({"data": file, "problem": problem, "samples": settings["samples"],
                         "correct": {name: int(own.column("correct")[i].sum()) for name, own in of_file.items()}})
             for file, of_file in kept.items() for i, problem in enumerate(next(iter(of_file.values())).problems)]
    replace_text(folder / f"{out}.problems.jsonl", "".join(line + "\n" for line in lines))
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
             "settings": settings}
    replace_text(folder / f"{out}.json", json.dumps(about | {"results": report}, indent=1) + "\n")
    print(f"\nwritten: {folder / out}.json, {out}.problems.jsonl (correct counts), evaluations/*/completions.jsonl")
    sizes = {file: f"{len(next(iter(of_file.values())).problems)} problems x {settings['samples']} samples"
             for file, of_file in kept.items()}
    print(plots.picture(folder / f"{out}.png", lambda plot: plots.pass_at_k(plot, report, sizes)))


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
