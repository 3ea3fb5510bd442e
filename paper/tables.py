"""Write the tables of `paper.reproduce`: means over seeds with 95 % intervals, paired differences.

A run is a line of results/WHAT/runs.jsonl, a dictionary with section (RLVR or RLIF), row, strength
(lambda, or the share of selected tokens), seed, run (its name), config and figures. The figures are
{"training": {metric: value}, "base": {file: {metric: value}}, "trained": likewise}; a path such as
("trained", file, metric) leads to one of them. `rows` is {(row, strength): {seed: run}}.
"""

import json
import math
from functools import cache
from itertools import permutations
from pathlib import Path
from statistics import mean

import numpy as np

from evaluate import markdown_table
from support.files import read_jsonl

BASELINE = {"RLVR": "GRPO", "RLIF": "INTUITOR"}  # the method without a penalty, by section
COMMON_LAMBDA = {"RLVR": 0.03, "RLIF": 0.3}  # lambda in the second half of Table 1
HEAD = """# {0}

Written by `python -m paper.reproduce {0}`. ± is half the 95 % interval over seeds (Student).
Differences are seed by seed: * is p < 0.05, corrected for the lines of a table (Holm) but not for
its columns; in brackets, on how many seeds it is above 0. Where all seeds have the same difference
there is no spread to test with, and no *.
"""

# ---------------------------------------------------------------- statistics


@cache
def t_distribution(freedom: int) -> tuple:
    """Return t from 0 to infinity, and P(|T| <= t) for Student's t.

    The density of T, as one of u = arctan(t / sqrt(freedom)), is cos(u)^(freedom - 1).
    """
    u = np.linspace(0, np.pi / 2, 50_001)
    density = np.cos(u) ** (freedom - 1)
    mass = np.cumsum(density) - (1 + density) / 2  # trapezoids; 1 is the first density
    return math.sqrt(freedom) * np.tan(u), mass / mass[-1]


def t_test(values: list) -> tuple:
    """Return the mean, half its 95 % interval, and the two-sided p-value for a mean of 0.

    The last two are nan for a single value, and the p-value is nan if all values are equal.
    """
    center = np.mean(values)
    freedom = len(values) - 1
    if freedom < 1:
        return center, math.nan, math.nan
    if np.ptp(values) < 1e-12:  # equal but for rounding
        return center, 0.0, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    t, mass = t_distribution(freedom)
    p = 1 - np.interp(abs(center) / error, t, mass)
    return center, np.interp(0.95, mass, t) * error, p


def holm(p_values: list) -> np.ndarray:
    """Correct p-values for their number (Holm 1979); a nan stays and does not count.

    The i-th smallest of n is multiplied by n - i + 1.
    """
    corrected = np.array(p_values)
    order = np.argsort(corrected)  # nan comes last
    remaining = np.sum(corrected >= 0) - np.arange(len(corrected))
    corrected[order] = np.maximum.accumulate(corrected[order] * remaining)
    return corrected.clip(max=1)


# ---------------------------------------------------------------- runs and their figures


def summarise_run(folder: Path) -> dict:
    """Return the figures of a finished run, from its metrics.jsonl and evaluation.json."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    seconds = sum(row["time/rollout"] + row["time/select"] + row["time/update"] for row in rows)
    training = {
        "seconds": seconds,
        "tokens/s": sum(row["tokens"] for row in rows) / seconds,
        "length": mean(row["length/mean"] for row in rows),
        "mem_gb": rows[-1]["mem_gb"],
        "selection/fraction": mean(row["selection/fraction"] for row in rows[-20:]),
    }
    figures = {"training": training, "base": {}, "trained": {}}
    for file, models in json.loads((folder / "evaluation.json").read_text()).items():
        for model in ("base", "trained"):
            metrics = models[model]
            figures[model][Path(file).stem] = {key: value for key, (value, _) in metrics.items()}
    return figures


def figure_of(run: dict, path: tuple) -> float:
    """Return the number at a path of a run's figures."""
    value = run["figures"]
    for key in path:
        value = value[key]
    return value


def over_seeds(runs: dict, path: tuple) -> tuple:
    """Return the mean over seeds and half its 95 % interval."""
    return t_test([figure_of(run, path) for run in runs.values()])[:2]


def differences(runs: dict, others: dict, path: tuple) -> list:
    """Return the differences between the runs of two rows, seed by seed."""
    seeds = [seed for seed in runs if seed in others]
    return [figure_of(runs[seed], path) - figure_of(others[seed], path) for seed in seeds]


def group_by_row(runs: list[dict], section: str) -> dict:
    """Return {(row, strength): {seed: run}} of one section, in the order of the runs."""
    rows = {}
    for run in runs:
        if run["section"] == section:
            rows.setdefault((run["row"], run["strength"]), {})[run["seed"]] = run
    return rows


def base_row(runs: list[dict]) -> dict:
    """Return the base model as a row with one run."""
    return {("base model", None): {0: {"figures": {"trained": runs[0]["figures"]["base"]}}}}


def row_label(row: tuple) -> str:
    """Return a row's label, with its strength if it has one."""
    label, strength = row
    return label if strength is None else f"{label}, {strength:g}"


def best_strengths(rows: dict) -> dict:
    """Return for each label the row with the highest Pass@1 on the validation problems."""
    path = ("trained", "validation", "pass@1")
    best = dict.fromkeys(label for label, _ in rows)
    for row in sorted(rows, key=lambda row: over_seeds(rows[row], path)[0]):
        best[row[0]] = row  # the last one of a label has the highest
    return {row: rows[row] for row in best.values()}


def files_and_metrics(runs: list[dict]) -> tuple:
    """Return the names of the evaluated problem files, and every Pass@k, the largest k last."""
    trained = runs[0]["figures"]["trained"]
    files = [file for file in trained if file != "validation"]
    return files, [metric for metric in trained[files[0]] if metric.startswith("pass@")]


# ---------------------------------------------------------------- tables


def with_interval(mean: float, half: float, sign="") -> str:
    """Write mean ± half with as many digits as the interval supports."""
    if math.isnan(half):
        return f"{mean:{sign}.3f}"
    digits = 3
    if half >= 1:
        digits = 0 if half >= 10 else 1
    return f"{mean:{sign}.{digits}f} ±{half:.{digits}f}"


def means_table(rows: dict, columns: dict) -> str:
    """Write a line per row: its mean over seeds ± half the 95 % interval."""
    lines = []
    for row, runs in rows.items():
        cells = [with_interval(*over_seeds(runs, path)) for path in columns.values()]
        lines.append([row_label(row), str(len(runs)), *cells])
    return markdown_table(["", "seeds", *columns], lines)


def differences_table(rows: dict, pairs: list, columns: dict) -> str:
    """Write a line per pair (row, reference): row minus reference; * is p < 0.05 after Holm."""
    lines = [[f"{row_label(row)} − {row_label(reference)}"] for row, reference in pairs]
    for path in columns.values():
        gaps = [differences(rows[row], rows[reference], path) for row, reference in pairs]
        p_values = holm([t_test(gap)[2] for gap in gaps])
        for line, gap, p in zip(lines, gaps, p_values):
            star = " *" if p < 0.05 else ""
            above = sum(value > 0 for value in gap)
            line.append(f"{with_interval(*t_test(gap)[:2], '+')}{star} ({above}/{len(gap)})")
    return markdown_table(["difference", *columns], lines)


def table_columns(name: str, runs: list[dict]) -> list[dict]:
    """Return {title: path} of the columns of each table of an experiment."""
    if name == "table4":
        return [{key: ("training", key) for key in ("seconds", "tokens/s", "length", "mem_gb")}]
    files, metrics = files_and_metrics(runs)
    first = files[0]
    if name == "figure3":
        return [{f"{metric.title()} {first}": ("trained", first, metric) for metric in metrics}]
    accuracy = {f"Pass@1 {file}": ("trained", file, "pass@1") for file in files}
    accuracy[f"d_collapse {first}"] = ("trained", first, "d_collapse")
    largest = metrics[-1]
    return [accuracy, {f"{largest.title()} {file}": ("trained", file, largest) for file in files}]


def comparisons(rows: dict, reference: str) -> list:
    """Return the pairs of rows whose difference is shown.

    reference: `baseline`, each row minus the baseline; `alone`, each "+ SCOPE" row minus the same
    row without; `q = 5 %`, each share minus 5 %; `SCOPE`, SCOPE minus all others but the baseline.
    """
    pairs = []
    for row, other in permutations(rows, 2):
        is_baseline = other[0] in BASELINE.values()
        is_pair = {
            "baseline": is_baseline,
            "alone": row[0] == f"{other[0]} + SCOPE",
            "q = 5 %": other == (row[0], 0.05),
            "SCOPE": row[0] == "SCOPE" and not is_baseline,
        }
        if is_pair[reference]:
            pairs.append((row, other))
    return pairs


def rows_to_show(name: str, rows: dict, section: str) -> dict:
    """Return {title: rows} of each table: for Table 1 the best strengths, then a common one."""
    if name != "table1":
        return {"": rows}
    strength = COMMON_LAMBDA[section]
    return {
        ", each at its λ of highest validation accuracy": best_strengths(rows),
        f", all at λ = {strength:g}": {
            row: runs for row, runs in rows.items() if row[1] in (None, strength)
        },
    }


def experiment_page(name: str, runs: list[dict], references: tuple) -> str:
    """Write table.md: for each section the means, then the differences from each reference."""
    parts = [HEAD.format(name)]
    base = {} if name == "table4" else base_row(runs)
    for section in dict.fromkeys(run["section"] for run in runs):
        for title, rows in rows_to_show(name, group_by_row(runs, section), section).items():
            parts.append(f"## {section}{title}\n")
            for columns in table_columns(name, runs):
                parts.append(means_table(base | rows, columns))
                for reference in references:
                    parts.append(differences_table(rows, comparisons(rows, reference), columns))
    return "\n".join(parts)
