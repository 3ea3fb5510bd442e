"""Tables over seeds: means with 95 % intervals, and paired differences with corrected p-values.

`lines` are the runs of an experiment, one dictionary each (reproduce.py): section, row, strength, seed, figures. A
column is (title, path into the figures). Runs of equal seed are paired, whatever their rows.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

from support.files import read_log
from support.tables import markdown_table


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def figures_of(folder: Path) -> dict:
    """Every figure of a finished run: of its steps, and of its evaluations before (`base`) and after them."""
    rows = [row for row in read_log(folder / "metrics.jsonl") if "loss" in row]
    last = rows[-max(1, len(rows) // 10):]
    seconds = [sum(value for key, value in row.items() if key.startswith("time/")) for row in rows]
    training = {"seconds": sum(seconds), "tokens": sum(row["tokens"] for row in rows),
                "tokens/s": sum(row["tokens"] for row in rows) / sum(seconds),
                "length": sum(row["length/mean"] for row in rows) / len(rows), "mem_gb": rows[-1]["mem_gb"]}
    for key in ("reward/accuracy", "entropy", "kl/selected", "selection/fraction", "selection/branching"):
        if values := [row[key] for row in last if row.get(key) is not None]:  # None: not finite
            training[key] = sum(values) / len(values)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation = {who: {Path(file).stem: {name: round(found[0], 6) for name, found in table[who].items()}
                        for file, table in evaluation.items()} for who in ("base", "trained")}
    return {"training": {key: round(found, 6) for key, found in training.items()}} | evaluation


def by_row(lines: list[dict], section: str) -> dict[tuple, dict[int, dict]]:
    """{(row, strength): {seed: line}} of one section, in the lines' order."""
    rows: dict[tuple, dict[int, dict]] = {}
    for line in lines:
        if line["section"] == section:
            rows.setdefault((line["row"], line["strength"]), {})[line["seed"]] = line
    return rows


def value(line: dict, path: tuple[str, ...]) -> float:
    found = line["figures"]
    for name in path:
        found = found[name]
    return float(found)


def name_of(row: tuple) -> str:
    """A row's name, with its strength where it has one."""
    label, strength = row
    return label if strength is None else f"{label}, {strength:g}"


def interval(mean: float, half: float, sign: str = "") -> str:
    digits = 0 if half >= 10 else 1 if half >= 1 else 3  # as many as the interval leaves a meaning
    return f"{mean:{sign}.3f}" if math.isnan(half) else f"{mean:{sign}.{digits}f} ±{half:.{digits}f}"


def means(rows: dict[tuple, dict[int, dict]], columns: list[tuple]) -> str:
    """A line a row: the mean over its seeds, ± half the 95 % interval."""
    table = []
    for row, runs in rows.items():
        cells = [interval(*mean_interval([value(line, path) for line in runs.values()])) for _, path in columns]
        table.append([name_of(row), str(len(runs)), *cells])
    return markdown_table(["", "seeds", *(title for title, _ in columns)], table)


def differences(rows: dict[tuple, dict[int, dict]], pairs: list[tuple[tuple, tuple]], columns: list[tuple]) -> str:
    """A line a pair (row, reference): row less reference, by seed. *: p < 0.05, corrected for the lines (Holm)."""
    found: list[list[tuple]] = []
    for _, path in columns:
        gaps = []
        for row, reference in pairs:
            seeds = sorted(rows[row].keys() & rows[reference].keys())
            gaps.append([value(rows[row][seed], path) - value(rows[reference][seed], path) for seed in seeds])
        p_values = holm([t_test(gap) for gap in gaps])
        found.append([(*mean_interval(gap), p, sum(x > 0 for x in gap), len(gap)) for gap, p in zip(gaps, p_values)])
    table = []
    for i, (row, reference) in enumerate(pairs):
        cells = []
        for column in found:
            mean, half, p, above, seeds = column[i]
            cells.append(f"{interval(mean, half, '+')}{' *' * (p < 0.05)} ({above}/{seeds})")
        table.append([f"{name_of(row)} − {name_of(reference)}", *cells])
    return markdown_table(["difference", *(title for title, _ in columns)], table)


def best_strength(rows: dict[tuple, dict[int, dict]], path: tuple[str, ...]) -> list[tuple]:
    """Of rows that differ only in strength the one of highest mean at `path`, over the seeds that all of them have.

    Rows without strength stay. What was not run at every strength that another was chooses nothing: it is left out.
    """
    strengths = {strength for _, strength in rows if strength is not None}
    best = []
    for label in dict.fromkeys(label for label, _ in rows):
        own = {row: runs for row, runs in rows.items() if row[0] == label}
        seeds = set.intersection(*(set(runs) for runs in own.values()))
        if seeds and {strength for _, strength in own} in ({None}, strengths):
            best.append(max(own, key=lambda row: sum(value(own[row][seed], path) for seed in seeds)))
    return best


# ---------------------------------------------------------------- statistics over seeds


@cache
def t_mass(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """u and P(|T| <= sqrt(freedom) tan u) for Student's t: its density in u is cos(u)^(freedom - 1)."""
    u = np.linspace(0, np.pi / 2, 50_001)
    mass = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2)])  # trapezoids
    return u, mass / mass[-1]


def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t, level >= 1/2."""
    u, mass = t_mass(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * level - 1, mass, u)))


def t_test(values) -> float:
    """Two-sided p-value of Student's test that the mean of the values is 0; nan for fewer than two, or all equal."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return math.nan
    t = abs(values.mean()) / (values.std(ddof=1) / math.sqrt(len(values)))
    u, mass = t_mass(len(values) - 1)
    return float(1 - np.interp(np.arctan(t / math.sqrt(len(values) - 1)), u, mass))


def mean_interval(values) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; nan for one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the i-th smallest times those not smaller. nan stays nan."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = list(p_values), 0.0
    for place, (p, i) in enumerate(known):
        highest = corrected[i] = max(highest, min(1.0, p * (len(known) - place)))
    return corrected
