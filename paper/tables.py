"""Write the tables of `paper.reproduce`: what was chosen on validation, the results, differences.

A run is a line of results/STUDY/runs.jsonl. Its method, rate, coef (lambda) and steps are its
setting; stage is `tuning` or `test`. S is the number of seeds, P that of problems.
"""

import re
from functools import cache

import numpy as np

from evaluate import markdown_table, pass_at_k

# Settings are chosen by the highest of one of these on the validation problems.
CHOSEN_BY = ("pass@1", "pass@16")
HEAD = """# {0}

Written by `python -m paper.reproduce {0}`. Intervals are 95 %, from a bootstrap over seeds and
problems together (entropy and d_collapse: over seeds). * an interval that is corrected for the
number of differences in its table excludes 0. spread: the standard deviation over seeds of the gain
in Pass@1. new: the share of problems that were solved at least once, and never by the base model of
the seed; lost: the other way round.
"""

# ---------------------------------------------------------------- the choice of settings


def settings_of(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Return {(method, rate, coef, step): [validation metrics of each tuning seed]}."""
    settings: dict[tuple, list] = {}
    for run in runs:
        if run["stage"] == "tuning":
            for step, metrics in run["validation"].items():
                key = (run["method"], run["rate"], run["coef"], int(step))
                settings.setdefault(key, []).append(metrics)
    return settings


def mean_metric(rows: list[dict], metric: str) -> float:
    return float(np.mean([row[metric] for row in rows]))


def choose(runs: list[dict], metric: str = "pass@1") -> dict[str, tuple]:
    """Return for each method the setting with the highest mean of a metric on validation."""
    settings = settings_of(runs)
    choices = {}
    for setting in sorted(settings, key=lambda key: mean_metric(settings[key], metric)):
        choices[setting[0]] = setting  # the last one of a method is its highest
    return choices


def reported(runs: list[dict], metric: str = "pass@1") -> dict[str, list[dict]]:
    """Return each method's test runs at its choice by a metric, in the order of their seeds."""
    choices = choose(runs, metric)
    methods: dict[str, list] = {}
    test = [run for run in runs if run["stage"] == "test"]
    for run in sorted(test, key=lambda run: run["seed"]):
        setting = (run["method"], run["rate"], run["coef"], run["steps"])
        # without tuning runs there is only one setting
        if choices.get(run["method"], setting) == setting:
            methods.setdefault(run["method"], []).append(run)
    order = list(dict.fromkeys(run["method"] for run in runs))
    return {method: methods[method] for method in order if method in methods}


# ---------------------------------------------------------------- statistics


@cache
def resamples(count: int, axis: int, number: int = 10_000) -> np.ndarray:
    """Return how often each of `count` things is in each resample, as shares.  [number, count]"""
    rng = np.random.default_rng(axis)
    return rng.multinomial(count, np.full(count, 1 / count), size=number) / count


def interval(values: np.ndarray, comparisons: int = 1) -> tuple[float, float, float]:
    """Return the mean of values [S, P] and its 95 % interval, by resampling seeds and problems.

    A bootstrap of S seeds underestimates their variance by (S - 1) / S, so the interval is
    stretched. With several comparisons the level is corrected for their number (Bonferroni).
    """
    seeds, problems = values.shape
    mean = float(values.mean())
    means = (resamples(problems, 1) @ values.T * resamples(seeds, 0)).sum(axis=1)
    tail = 0.025 / comparisons
    stretch = (seeds / max(seeds - 1, 1)) ** 0.5
    low, high = mean + stretch * (np.quantile(means, [tail, 1 - tail]) - mean)
    return mean, float(low), float(high)


def pass_values(runs: list[dict], file: str, model: str, k: int) -> np.ndarray:
    """Return Pass@k of every seed and problem.  [S, P]"""
    results = [run["test"][file] for run in runs]
    counts = np.array([result["correct"][model] for result in results])
    samples = results[0]["samples"]
    return pass_at_k(samples, np.arange(samples + 1), k)[counts]  # once for each count


def metric_values(runs: list[dict], file: str, model: str, metric: str) -> np.ndarray:
    """Return another metric of every seed.  [S, 1]"""
    return np.array([[run["test"][file][model][metric][0]] for run in runs])


def test_files(runs: list[dict]) -> dict[str, list[int]]:
    """Return {test file: the k of its Pass@k}."""
    run = next(run for run in runs if run["stage"] == "test")
    return {
        file: [k for k in (1, 4, 16, 64) if k <= result["samples"]]
        for file, result in run["test"].items()
    }


# ---------------------------------------------------------------- tables


def validation_metrics(settings: dict) -> list[str]:
    """Return the names of the metrics to show: Pass@1, Pass@k for the largest k, and diversity."""
    metrics = next(iter(settings.values()))[0]
    *_, largest = [name for name in metrics if re.fullmatch(r"pass@\d+", name)]
    return ["pass@1", largest, "entropy", "d_collapse"]


def choices_table(runs: list[dict], metric: str) -> str:
    """Write which setting each method got, and its metrics on the validation problems."""
    settings = settings_of(runs)
    metrics = validation_metrics(settings)
    choices = choose(runs, metric)
    lines = []
    for method in dict.fromkeys(method for method, *_ in settings):
        setting = choices[method]
        _, rate, coef, step = setting
        means = [f"{mean_metric(settings[setting], metric):.3f}" for metric in metrics]
        lines.append([method, f"{rate:g}", f"{coef:g}", str(step), *means])
    return markdown_table(["method", "rate", "λ", "steps", *metrics], lines)


def rates_table(runs: list[dict]) -> str:
    """Write Pass@1 / Pass@k on validation at each rate and step, with the λ that is best there."""
    settings = settings_of(runs)
    one, largest, *_ = validation_metrics(settings)
    columns = sorted({(rate, step) for _, rate, _, step in settings})
    lines = []
    for method in dict.fromkeys(method for method, *_ in settings):
        cells = []
        for column in columns:
            there = [
                (mean_metric(rows, one), mean_metric(rows, largest))
                for setting, rows in settings.items()
                if (setting[0], setting[1], setting[3]) == (method, *column)
            ]
            best = max(there, default=None)
            cells.append("" if best is None else f"{best[0]:.3f} / {best[1]:.3f}")
        lines.append([method, *cells])
    titles = [f"{rate:g}, {step} steps" for rate, step in columns]
    return markdown_table([f"{one} / {largest}", *titles], lines)


def with_interval(values: np.ndarray, sign: str = "") -> str:
    mean, low, high = [round(number, 3) + 0.0 for number in interval(values)]  # no -0.000
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def results_table(methods: dict[str, list[dict]], file: str, ks: list[int]) -> str:
    """Write every method's metrics on a test file, the base model's first."""
    lines = []
    base = {"base model": next(iter(methods.values()))}
    for method, runs in (base | methods).items():
        model = "base" if method == "base model" else "trained"
        values = [pass_values(runs, file, model, k) for k in ks]
        values += [metric_values(runs, file, model, name) for name in ("entropy", "d_collapse")]
        cells = [with_interval(value) for value in values]
        lines.append([method, str(len(runs)), *cells, *gains(runs, file, model)])
    titles = [f"Pass@{k}" for k in ks]
    last = ["entropy", "d_collapse", "spread", "new", "lost"]
    return markdown_table(["", "seeds", *titles, *last], lines)


def gains(runs: list[dict], file: str, model: str) -> list[str]:
    """Return the spread over seeds of the gain in Pass@1, and the shares of problems new and lost.

    A problem is new if the model solved it at least once and the base model of the seed never did,
    and lost if it is the other way round.
    """
    solved = pass_values(runs, file, model, 1)
    before = pass_values(runs, file, "base", 1)
    spread = (solved - before).mean(axis=1).std(ddof=1) if len(runs) > 1 else 0.0
    new = ((solved > 0) & (before == 0)).mean()
    lost = ((solved == 0) & (before > 0)).mean()
    return [f"{value:.3f}" for value in (spread, new, lost)]


def differences_table(
    methods: dict[str, list[dict]], pairs: list[tuple[str, str]], file: str, ks: list[int]
) -> str:
    """Write one method minus another for each pair, on the same seeds and problems."""
    lines = []
    comparisons = len(pairs) * len(ks)
    for method, other in pairs:
        model = "base" if other == "base model" else "trained"
        others = methods.get(other, methods[method])
        count = min(len(methods[method]), len(others))  # while runs are missing
        cells = []
        for k in ks:
            gap = pass_values(methods[method][:count], file, "trained", k)
            gap = gap - pass_values(others[:count], file, model, k)
            _, low, high = interval(gap, comparisons)
            star = " *" if low > 0 or high < 0 else ""
            cells.append(with_interval(gap, "+") + star)
        lines.append([f"{method} − {other}", *cells])
    return markdown_table(["difference", *(f"Pass@{k}" for k in ks)], lines)


def pairs_of(methods: dict) -> list[tuple[str, str]]:
    """List what is compared.

    A method "X + SCOPE" is compared with X, others with GRPO and SCOPE, and these two with the
    base model.
    """
    pairs = [(method, "base model") for method in ("GRPO", "SCOPE") if method in methods]
    for other in methods:
        for method in methods:
            if method.endswith(" + SCOPE"):
                compared = other == method.removesuffix(" + SCOPE")
            else:
                compared = other in ("GRPO", "SCOPE") and method not in ("GRPO", other)
            if compared:
                pairs.append((method, other))
    return pairs


def page(name: str, runs: list[dict]) -> str:
    """Write table.md."""
    parts = [HEAD.format(name)]
    tuned = any(run["stage"] == "tuning" for run in runs)
    if tuned:
        for metric in CHOSEN_BY:
            title = f"## Chosen on validation problems, by {metric.title()}"
            parts += [title, choices_table(runs, metric)]
        parts += ["## Every rate and number of steps on validation problems", rates_table(runs)]
    for metric in CHOSEN_BY if tuned else CHOSEN_BY[:1]:
        methods = reported(runs, metric)
        stopped = reported(runs, CHOSEN_BY[1]).get("GRPO")
        if metric == "pass@1" and stopped and stopped != methods.get("GRPO"):
            methods["GRPO by Pass@16"] = stopped
        for file, ks in test_files(runs).items() if methods else ():
            title = f"## {file}"
            if tuned:
                title += f", settings chosen by {metric.title()}"
            parts += [title, results_table(methods, file, ks)]
            parts.append(differences_table(methods, pairs_of(methods), file, ks))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)
