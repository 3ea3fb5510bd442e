"""Evaluate models on held-out problems: Acc@n, Pass@k and d_collapse, and compare them.

    python evaluate.py model=runs/countdown-scope-seed0/model samples=128
    python evaluate.py "model=[toy,runs/a/model]" data=problems.jsonl samples=256 show=3
    python evaluate.py recipe=runs/a/config.yaml model=runs/a/model "data=[gsm8k,math500,amc]"
    torchrun --nproc_per_node=4 evaluate.py model=... samples=128

Completions are sampled at the training temperature from the full distribution, by the same code
and with the same grader as in training. Each result is kept in evaluations/ and used again if the
same model is evaluated on the same problems with the same settings. Shapes: P problems, n samples
of each.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

# Waiting threads of torch must sleep, not spin: on a busy machine spinning stops all the others.
# torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import toy
from rewards import check_grader, grade, grader_fingerprint
from rollout import Rollout, sample, sampling_settings
from support import distributed, models
from support.config import (
    flatten,
    load_config,
    one_line_errors,
    read_run_config,
    require,
    show_help,
    split_list,
)
from support.distributed import World, note
from support.files import file_name, fingerprint, replace_text
from support.log import versions

POWERS_OF_2 = [2**i for i in range(20)]
EVALUATION_STEP = -1  # the `step` that seeds evaluations; no training step has this number

# Settings of this command only.
SETTINGS = {
    "data": "auto",  # problem file, or several as [a,b]; auto: generated Countdown problems
    "problems": 200,  # number of problems per file
    "samples": 16,  # completions per problem
    "show": 0,  # number of easiest and of hardest problems whose completions are printed
}
# The settings of config.yaml that it uses; a name that ends with a dot is a group of settings.
USED_SETTINGS = (
    "recipe",
    "model",
    "prompt.",
    "grader",
    "seed",
    "max_new_tokens",
    "temperature",
    "precision",
    "rollout.",
    "countdown.",
    "toy.",
    "distributed_timeout",
)

# ---------------------------------------------------------------- metrics


def pass_at_k(num_samples, num_correct, k: int):
    """Estimate the probability that at least one of k samples is correct.

    This is the unbiased estimator of Chen et al. (2021), 1 - C(n-c, k) / C(n, k), in whole numbers,
    which are exact and cannot overflow. num_samples and num_correct are whole numbers or arrays of
    them; the result has their shape.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    of_one = np.vectorize(lambda n, c: 1 - math.comb(n - c, k) / math.comb(n, k), otypes=[float])
    result = of_one(num_samples, num_correct)
    return float(result) if result.ndim == 0 else result


def forking_threshold(base_entropy, fraction: float = 0.2) -> float:
    """Return h*, the entropy that `fraction` of the base model's tokens exceed."""
    return float(np.quantile(np.asarray(base_entropy).ravel(), 1 - fraction, method="inverted_cdf"))


def d_collapse(base_entropy, entropy, *, fraction: float = 0.2) -> float:
    """Return the relative loss of forking tokens, 1 - f(model) / f(base).  Section 4.2

    It is 0 for the base model itself, and 1 if no forking token is left. A forking token is one
    whose entropy exceeds h*, the threshold that `fraction` of the base model's tokens exceed, and f
    is the share of forking tokens. base_entropy and entropy are the token entropies of each model
    on its own rollouts. f(base) is counted and not assumed to be `fraction`, because ties at h*
    would otherwise look like collapse.
    """
    base_entropy = np.asarray(base_entropy).ravel()
    entropy = np.asarray(entropy).ravel()
    threshold = forking_threshold(base_entropy, fraction)
    forking = (base_entropy > threshold).mean()
    if forking == 0:
        return 0.0
    return float(1 - (entropy > threshold).mean() / forking)


@dataclass
class Estimate:
    """Holds a metric that is a ratio of sums over problems p, sum_p top_p / sum_p bottom_p.

    For a plain mean over problems `bottom` is 1.
    """

    top: np.ndarray  # [P]
    bottom: np.ndarray  # [P]

    @property
    def value(self) -> float:
        return float(self.top.sum() / self.bottom.sum())

    @property
    def error(self) -> float | None:
        """Return the standard error over problems, or None if there is only one problem.

        The samples of one problem are not independent, so a problem counts as one observation.
        """
        problems = len(self.top)
        if problems < 2:
            return None
        residual = self.top - self.bottom * self.top.sum() / self.bottom.sum()
        spread = np.sqrt((residual**2).sum() * problems / (problems - 1))
        return float(spread / self.bottom.sum())


def difference(
    first: Estimate, second: Estimate, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return second - first on the same problems, with its 95 % interval.

    The interval is from a paired bootstrap over problems.
    """
    rng = np.random.default_rng(seed)
    index = rng.integers(len(first.top), size=(resamples, len(first.top)))
    means = []
    for estimate in (first, second):
        means.append(estimate.top[index].sum(axis=1) / estimate.bottom[index].sum(axis=1))
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return second.value - first.value, float(low), float(high)


@dataclass
class Evaluation:
    """Holds the results of n samples of each of P problems.

    Token entropies are flat, in the order of the completions.
    """

    correct: np.ndarray  # [P, n] bool
    lengths: np.ndarray  # [P, n] tokens
    stopped: np.ndarray  # [P, n] bool, False: truncated
    entropy: np.ndarray  # [tokens] float32, nats

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several runs may write the same file
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **vars(self))
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**arrays)

    def sum_per_problem(self, token_values: np.ndarray) -> np.ndarray:
        """Sum a flat token quantity over each problem's tokens.  [tokens] -> [P]"""
        ends = self.lengths.sum(axis=1).cumsum()
        totals = np.concatenate([[0.0], np.cumsum(token_values, dtype=np.float64)])
        return np.diff(totals[np.concatenate([[0], ends])])

    def metrics(self, base: "Evaluation | None" = None) -> dict[str, Estimate]:
        """Return every metric in the order of the table; Pass@k for each power of 2 up to n.

        d_collapse is included only if `base`, the result of the base model, is given.
        """
        problems, samples = self.correct.shape
        first_16 = self.correct[:, :16]
        one = np.ones(problems)
        tokens = self.lengths.sum(axis=1).astype(float)
        metrics = {f"acc@{first_16.shape[1]}": Estimate(first_16.mean(axis=1), one)}
        for k in POWERS_OF_2:
            if k <= samples:
                values = pass_at_k(samples, self.correct.sum(axis=1), k)
                metrics[f"pass@{k}"] = Estimate(values, one)
        metrics["entropy"] = Estimate(self.sum_per_problem(self.entropy), tokens)
        if base is not None:
            threshold = forking_threshold(base.entropy)
            forking = self.sum_per_problem(self.entropy > threshold)
            share = (base.entropy > threshold).mean()  # 0 only if the highest entropy is a tie
            lost = tokens - forking / share if share > 0 else 0 * tokens
            metrics["d_collapse"] = Estimate(lost, tokens)  # as the function d_collapse
        metrics["length"] = Estimate(self.lengths.mean(axis=1), one)
        metrics["truncated"] = Estimate(1 - self.stopped.mean(axis=1), one)
        return metrics

    def summary(self, base: "Evaluation | None" = None) -> dict[str, tuple]:
        """Return {metric: (value, standard error)}."""
        return {name: (metric.value, metric.error) for name, metric in self.metrics(base).items()}


# ---------------------------------------------------------------- sampling


def sample_rows(
    model, tokenizer, problems, rows, config, world, *, samples: int, seed: int, progress=None
) -> tuple[Rollout, Tensor, list[str]]:
    """Sample and grade some completions of an evaluation: row i belongs to problem i // samples.

    The same rows always give the same completions. Returns the rollout, correct [rows], and
    the texts.
    """
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    models.check_lengths(model.config, prompts, config.max_new_tokens)
    prompt_of_row = [prompts[row // samples] for row in rows]
    problem_of_row = [problems[row // samples] for row in rows]
    settings = sampling_settings(config) | {"seed": seed, "step": EVALUATION_STEP}
    stop = models.stop_ids(model, tokenizer)
    with world.autocast():
        rollout = sample(model, prompt_of_row, list(rows), stop=stop, progress=progress, **settings)
    correct, texts = grade(tokenizer, problem_of_row, rollout, config.grader)
    return rollout, correct, texts


def evaluate(
    model,
    tokenizer,
    problems,
    config,
    world: World,
    *,
    samples: int,
    seed: int,
    title: str,
    folder: Path | None = None,
) -> Evaluation:
    """Sample and grade `samples` completions per problem.

    The work is split over ranks, and every rank returns the whole result. With a folder the result
    is stored there, and read from there if it exists.
    """
    stored = None
    if folder is not None:
        identity = [
            models.fingerprint(model),
            problems,
            data.prompt_ids(tokenizer, problems, config.prompt),
            models.stop_ids(model, tokenizer),
            grader_fingerprint(config.grader),
            config.max_new_tokens,
            config.temperature,
            samples,
            seed,
            world.device.type,
            str(world.dtype),
        ]
        stored = folder / f"{fingerprint(identity)}.npz"
        if world.max(int(world.is_main and stored.exists())):
            return Evaluation.load(stored)
    rows = world.slice(len(problems) * samples)
    with tqdm(
        total=len(rows), desc=title, unit="sample", leave=False, disable=world.hide_bar
    ) as bar:
        rollout, correct, _ = sample_rows(
            model,
            tokenizer,
            problems,
            rows,
            config,
            world,
            samples=samples,
            seed=seed,
            progress=bar.update,
        )
    columns = torch.stack([correct.long(), rollout.lengths, rollout.stopped.long()], dim=1)
    table = world.gather(columns).cpu().numpy()
    correct, lengths, stopped = table.T.reshape(3, len(problems), samples)
    entropy = world.gather(rollout.entropy[rollout.mask]).cpu().numpy()
    result = Evaluation(correct.astype(bool), lengths, stopped.astype(bool), entropy)
    if stored is not None and world.is_main:
        result.save(stored)
    return result


# ---------------------------------------------------------------- tables


def evaluation_metrics(
    results: dict[str, Evaluation], base: dict[str, Evaluation] | None = None
) -> dict[str, float]:
    """Return eval/NAME for the first file and eval/FILE/NAME for the others."""
    metrics = {}
    for i, (file, result) in enumerate(results.items()):
        prefix = "eval/"
        if i > 0:
            prefix = f"eval/{file_name(file)}/"
        summary = result.summary(base[file] if base else None)
        for name, (value, _) in summary.items():
            metrics[prefix + name] = value
    return metrics


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def metrics_table(summaries: dict[str, dict[str, tuple]]) -> str:
    """Write a table with a row per metric and a column per model: value ± standard error."""
    names = dict.fromkeys(name for summary in summaries.values() for name in summary)
    names.pop("differences", None)  # print_comparison writes a table of them
    rows = []
    for name in names:
        row = [name]
        for summary in summaries.values():
            row.append(with_error(*summary[name]) if name in summary else "")
        rows.append(row)
    return markdown_table(["", *summaries], rows)


def with_error(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:z.3f}"  # z: no -0.000
    return f"{value:z.3f} ± {error:.3f}"


def caption(problems: int, samples: int, temperature: float) -> str:
    """Write what the numbers of a table mean."""
    return (
        f"{problems} held-out problems, {samples} samples each at temperature {temperature:g}; "
        f"± is the standard error over problems. Pass@k is the chance that at least one of k "
        "samples is correct."
    )


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    config = load_evaluation_config(arguments)
    names = split_list(config.model)
    with distributed.start(config.precision, config.distributed_timeout) as world:
        report = {}
        for file in split_list(config.data):
            problems = load_file(file, config)
            results = evaluate_models(names, file, problems, config, world)
            report[file] = compare(results)
            if world.is_main:
                print_comparison(file, report[file], len(problems), config)
        if world.is_main:
            write_report(report, config)


def load_evaluation_config(arguments: list[str]):
    """Read config.yaml and a recipe, then this command's settings and arguments over both.

    The problems are those of `evaluation.data`, unless data= names others.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        require(
            key in SETTINGS or key.startswith(USED_SETTINGS),
            f"{argument}: evaluate.py does not use this setting; its own are {', '.join(SETTINGS)}",
        )
    recipe = [argument for argument in arguments if argument.startswith("recipe=")]
    others = [argument for argument in arguments if not argument.startswith("recipe=")]
    training = load_config(recipe)
    heldout = {"data": training.evaluation.data, "problems": training.evaluation.problems}
    config = load_config(others, flatten(training) | SETTINGS | heldout)
    require(
        "auto" not in split_list(config.data) or training.data == "countdown",
        f"recipe={training.recipe} evaluates on a share of its training file: give data=FILE",
    )
    check_grader(config.grader)
    return config


def load_file(file: str, config) -> list[dict]:
    """Return the problems of a file, at most `problems` of them."""
    if file == "auto":
        return data.countdown(config.problems, heldout=True, **vars(config.countdown))
    return data.sample_problems(data.read_problems(file), config.problems, file)


def evaluate_models(
    names: list[str], file: str, problems: list[dict], config, world: World
) -> dict[str, Evaluation]:
    """Evaluate every model on one problem file, and print completions if `show` asks for them."""
    results = {}
    for name in names:
        path = toy.resolve_model(config, world, name)
        warn_other_prompts(path, config)
        model, tokenizer = models.load(path, world.dtype)
        model.to(world.device)
        results[name] = evaluate(
            model,
            tokenizer,
            problems,
            config,
            world,
            samples=config.samples,
            seed=config.seed,
            title=f"{name} on {file}",
            folder=Path("evaluations"),
        )
        if world.is_main and config.show > 0:
            print_examples(name, model, tokenizer, problems, results[name], config, world)
    return results


def warn_other_prompts(model: str, config) -> None:
    """Print a note if the run that trained this model used another prompt than this evaluation."""
    run = Path(model).parent
    if run.name == "checkpoints":
        run = run.parent
    trained = read_run_config(run)
    for key, value in flatten(config.prompt, "prompt.").items():
        if trained.get(key, value) != value:
            note(
                f"{model} was trained with {key}={trained[key]} and is evaluated with another "
                f"prompt; recipe={run}/config.yaml gives the same"
            )


def compare(results: dict[str, Evaluation]) -> dict[str, dict]:
    """Return {model: {metric: (value, error)}}.

    From the second model on it also has "differences" from the first. A difference is (value, low,
    high), with the 95 % interval of a paired bootstrap over problems.
    """
    base = next(iter(results.values()))
    metrics = {}
    for name, result in results.items():
        metrics[name] = result.metrics(base if len(results) > 1 else None)
    first, *others = metrics
    report = {}
    for name, estimates in metrics.items():
        report[name] = {
            metric: (estimate.value, estimate.error) for metric, estimate in estimates.items()
        }
    for name in others:
        report[name]["differences"] = {
            metric: difference(metrics[first][metric], estimate)
            for metric, estimate in metrics[name].items()
        }
    return report


def print_comparison(file: str, report: dict[str, dict], problems: int, config) -> None:
    """Print the table of one problem file, and the differences from the first model."""
    first, *others = report
    print(
        f"\n{file}:\n{metrics_table(report)}{caption(problems, config.samples, config.temperature)}"
    )
    if not others:
        return
    rows = []
    for metric in report[others[0]]["differences"]:
        row = [metric]
        for name in others:
            value, low, high = report[name]["differences"][metric]
            star = " *" if low > 0 or high < 0 else ""
            row.append(f"{value:+z.3f} [{low:+z.3f}, {high:+z.3f}]{star}")
        rows.append(row)
    print(f"\nDifference from {first}, with the 95 % interval of a paired bootstrap over problems;")
    print("* the interval excludes 0:\n")
    print(markdown_table(["", *others], rows), end="")


def print_examples(
    name: str, model, tokenizer, problems, result: Evaluation, config, world: World
) -> None:
    """Print a correct and a wrong completion of each of the easiest and hardest problems."""
    samples = config.samples
    order = np.argsort(-result.correct.sum(axis=1), kind="stable").tolist()
    for index in dict.fromkeys(order[: config.show] + order[-config.show :]):
        print(f"\n{name}, problem {index}: {result.correct[index].sum()} of {samples} correct")
        print(f"  {json.dumps(problems[index])}")
        # sampled again, because an Evaluation has no texts
        rows = range(index * samples, (index + 1) * samples)
        _, correct, texts = sample_rows(
            model, tokenizer, problems, rows, config, world, samples=samples, seed=config.seed
        )
        for verdict, word in ((True, "correct"), (False, "wrong")):
            examples = [text for text, right in zip(texts, correct.tolist()) if right == verdict]
            if examples:
                print(f"  {word}: {examples[0].strip()}")


def result_name(config) -> str:
    """Return the name of the result in evaluations/."""
    text = file_name(f"{config.model.strip('[]')}-on-{config.data.strip('[]')}".replace(",", "-"))
    return f"{text[:80]}-{fingerprint(flatten(config))}"


def write_report(report: dict, config) -> None:
    """Write the results to evaluations/, with date, versions and settings."""
    path = Path("evaluations") / f"{result_name(config)}.json"
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "settings": flatten(config),
    }
    replace_text(path, json.dumps(about | {"results": report}, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
