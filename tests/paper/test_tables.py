"""Statistics over seeds against printed tables, definitions and hand arithmetic; the tables."""

import json
import math
import re
from itertools import permutations

import numpy as np
import pytest

from paper import tables
from paper.tables import holm, t_distribution, t_test


def make_run(row, seed, x, y=0.0, strength=None, section="RLVR"):
    figures = {"a": {"x": x}, "y": y, "trained": {"validation": {"pass@1": x}}}
    return {"section": section, "row": row, "strength": strength, "seed": seed, "figures": figures}


def compact(table: str) -> str:
    """Return a table without the spaces that align its columns."""
    return re.sub(" +", " ", table)


X = {"X": ("a", "x")}
COLUMNS = X | {"Y": ("y",)}
PAIR = [(("B", None), ("A", None))]


def test_t_distribution_against_printed_tables():
    """P(|T| <= t) is 0.95 at the 97.5 % quantile, and 0.90 at the 95 % quantile."""
    quantiles = {1: 12.7062, 2: 4.3027, 3: 3.1824, 9: 2.2622, 30: 2.0423, 100_000: 1.96}
    for freedom, value in quantiles.items():
        t, mass = t_distribution(freedom)
        assert np.interp(0.95, mass, t) == pytest.approx(value, abs=2e-4)
    t, mass = t_distribution(5)
    assert np.interp(0.9, mass, t) == pytest.approx(2.0150, abs=1e-4)


@pytest.mark.parametrize(
    "freedom, p, t", [(4, 0.05, 2.776), (4, 0.01, 4.604), (9, 0.05, 2.262), (1, 0.05, 12.706)]
)
def test_t_test_against_printed_tables(freedom, p, t):
    n = freedom + 1
    spread = [(-1) ** i for i in range(n - n % 2)] + [0] * (n % 2)
    deviation = math.sqrt(sum(x * x for x in spread) / freedom)
    # mean t / sqrt(n), deviation 1
    mean, half, p_value = t_test([t / math.sqrt(n) + x / deviation for x in spread])
    assert mean == pytest.approx(t / math.sqrt(n)) and p_value == pytest.approx(p, rel=2e-3)
    if p == 0.05:  # the interval just touches 0
        assert mean == pytest.approx(half, rel=1e-3)


def test_t_test_without_spread():
    assert t_test([1.0])[0] == 1 and np.isnan(t_test([1.0])[1:]).all()
    for equal in ([2.0, 2.0], [0.02 - 0.01, 0.03 - 0.02, 0.08 - 0.07]):  # also but for rounding
        mean, half, p = t_test(equal)
        assert mean == pytest.approx(equal[0]) and half == 0 and math.isnan(p)


def test_holm_against_its_definition():
    """Reject, from the smallest p on, while p <= level / (number left).

    The corrected p is the least such level.
    """
    p_values = [0.01, 0.04, 0.03, 0.005]
    for order in permutations(range(4)):
        shuffled = [p_values[i] for i in order]
        for level in (0.019, 0.021, 0.029, 0.031, 0.059, 0.061):
            rejected = set()
            ranked = sorted(range(4), key=lambda i: shuffled[i])
            for left, i in zip((4, 3, 2, 1), ranked):
                if shuffled[i] > level / left:
                    break
                rejected.add(i)
            assert {i for i, p in enumerate(holm(shuffled)) if p <= level} == rejected
    assert np.array_equal(holm([math.nan, 0.02, 0.6]), [math.nan, 0.04, 0.6], equal_nan=True)


def test_means_and_paired_differences():
    lines = [make_run("A", seed, 0.1 * seed, y=1.0) for seed in range(4)]
    # no seed 0
    lines += [make_run("B", seed, 0.1 * seed + 0.5 + 0.001 * (seed % 2)) for seed in (3, 1, 2)]
    lines += [make_run("A", 0, 9.0, section="RLIF")]
    rows = tables.group_by_row(lines, "RLVR")
    means = compact(tables.means_table(rows, COLUMNS)).splitlines()
    assert means[0] == "| | seeds | X | Y |"
    assert means[2] == "| A | 4 | 0.150 ±0.205 | 1.000 ±0.000 |"  # 3.182 * 0.1291 / 2
    assert means[3].startswith("| B | 3 | 0.701 ±")
    text = compact(tables.differences_table(rows, PAIR, COLUMNS))
    assert "| B − A | +0.501 ±0.001 * (3/3) | -1.000 ±0.000 (0/3) |" in text


def test_digits_follow_the_interval():
    large = {("A", None): {s: make_run("A", s, 10000.0 + 500 * s, y=80 + s) for s in range(3)}}
    text = compact(tables.means_table(large, COLUMNS))
    assert "| A | 3 | 10500 ±1242 | 81.0 ±2.5 |" in text  # 4.303 * 500 / sqrt(3), and of 1


def test_no_star_without_significance():
    lines = [make_run("A", seed, 0.3) for seed in range(3)]
    lines += [make_run("B", seed, x) for seed, x in enumerate((0.1, 0.6, 0.3))]
    text = tables.differences_table(tables.group_by_row(lines, "RLVR"), PAIR, X)
    assert "*" not in text and "(1/3)" in text


def test_best_strength_is_that_of_highest_validation():
    scores = {0.1: (0.2, 0.4), 0.3: (0.9, 0.0), 1.0: (0.1, 0.2)}
    lines = [make_run("base", 0, 0.0)]
    for strength, values in scores.items():
        lines += [make_run("A", seed, x, strength=strength) for seed, x in enumerate(values)]
    assert list(tables.best_strengths(tables.group_by_row(lines, "RLVR"))) == [
        ("base", None),
        ("A", 0.3),
    ]


def test_figures_of_a_run(tmp_path):
    """Sums and means of its logs; validation of steps without a loss does not count."""
    rows = [{"step": 0, "eval/pass@1": 0.5}]
    for step in range(1, 31):
        times = {"time/rollout": 1.0, "time/select": 0.5, "time/update": 0.5}
        row = {"step": step, "loss": 0.0, "tokens": 10.0, "mem_gb": step, "length/mean": step}
        rows.append(row | times | {"selection/fraction": float(step > 10)})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {"a/x.jsonl": {"base": {"pass@1": [0.25, 0.1]}, "trained": {"pass@1": [0.5, 0.1]}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    assert tables.summarise_run(tmp_path) == {
        "training": {
            "seconds": 60.0,
            "tokens/s": 5.0,
            "length": 15.5,
            "mem_gb": 30,
            "selection/fraction": 1.0,
        },
        "base": {"x": {"pass@1": 0.25}},
        "trained": {"x": {"pass@1": 0.5}},
    }
