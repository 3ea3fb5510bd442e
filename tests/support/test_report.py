"""Statistics over seeds against tables, enumeration and hand arithmetic; the tables that are made of them."""

import math
from itertools import permutations

import pytest

from support import report
from support.report import holm, mean_interval, t_test


def line(row, seed, x, y=0.0, strength=None, section="RLVR"):
    return {"section": section, "row": row, "strength": strength, "seed": seed, "figures": {"a": {"x": x}, "y": y}}


COLUMNS = [("X", ("a", "x")), ("Y", ("y",))]


def test_t_test_against_tables():
    """t at the two-sided 5 % and 1 % points of printed tables: 2.776 and 4.604 for 4 degrees of freedom, and so on."""
    for freedom, p, t in ((4, 0.05, 2.776), (4, 0.01, 4.604), (9, 0.05, 2.262), (1, 0.05, 12.706)):
        n = freedom + 1
        spread = [(-1) ** i for i in range(n - n % 2)] + [0] * (n % 2)
        size = math.sqrt(sum(x * x for x in spread) / freedom)
        values = [t / math.sqrt(n) + x / size for x in spread]  # mean t / sqrt(n), deviation 1
        assert t_test(values) == pytest.approx(p, rel=2e-3)
        mean, half = mean_interval(values)
        if p == 0.05:  # the interval just touches 0
            assert mean == pytest.approx(half, rel=1e-3)
    assert math.isnan(t_test([1.0])) and math.isnan(t_test([2.0, 2.0])) and math.isnan(mean_interval([1.0])[1])


def test_holm_against_its_definition():
    """Reject, from the smallest p on, while p <= level / (number left): the corrected p is the least such level."""
    p_values = [0.01, 0.04, 0.03, 0.005]
    for order in permutations(range(4)):
        shuffled = [p_values[i] for i in order]
        for level in (0.019, 0.021, 0.029, 0.031, 0.059, 0.061):
            rejected, ranked = set(), sorted(range(4), key=lambda i: shuffled[i])
            for left, i in zip((4, 3, 2, 1), ranked):
                if shuffled[i] > level / left:
                    break
                rejected.add(i)
            assert {i for i, p in enumerate(holm(shuffled)) if p <= level} == rejected
    assert holm([math.nan, 0.02])[1] == 0.02 and math.isnan(holm([math.nan, 0.02])[0])


def test_means_and_paired_differences():
    lines = [line("A", seed, 0.1 * seed, y=1.0) for seed in range(4)]
    lines += [line("B", seed, 0.1 * seed + 0.5 + 0.001 * (seed % 2)) for seed in (3, 1, 2)]  # no seed 0
    lines += [line("A", 0, 9.0, section="RLIF")]
    rows = report.by_row(lines, "RLVR")
    means = report.means(rows, COLUMNS).splitlines()
    assert means[0] == "|  | seeds | X | Y |"
    assert means[2] == "| A | 4 | 0.150 ±0.205 | 1.000 ±0.000 |"  # 3.182 * 0.1291 / 2
    assert means[3].startswith("| B | 3 | 0.701 ±")
    text = report.differences(rows, [(("B", None), ("A", None))], COLUMNS)
    assert "| B − A | +0.501 ±0.001 * (3/3) | -1.000 ±0.000 (0/3) |" in text
    large = report.means({("A", None): {s: line("A", s, 10000.0 + 500 * s, y=80 + s) for s in range(3)}}, COLUMNS)
    assert "| A | 3 | 10500 ±1242 | 81.0 ±2.5 |" in large  # 4.303 * 500 / sqrt(3), and of 1
    same = [line("A", s, 0.3) for s in range(3)] + [line("B", s, x) for s, x in enumerate((0.1, 0.6, 0.3))]
    text = report.differences(report.by_row(same, "RLVR"), [(("B", None), ("A", None))], COLUMNS[:1])
    assert " *" not in text and "(1/3)" in text


def test_best_strength():
    lines = [line("A", s, x, strength=w) for w, xs in ((0.1, (0.2, 0.4)), (0.3, (0.9, 0.0))) for s, x in enumerate(xs)]
    lines += [line("base", 0, 0.0)]
    assert report.best_strength(report.by_row(lines, "RLVR"), ("a", "x")) == [("A", 0.3), ("base", None)]
    assert report.best_strength(report.by_row([*lines, line("A", 2, 9.0, strength=0.1)], "RLVR"), ("a", "x")) == [
        ("A", 0.3), ("base", None)]  # a seed that only one strength has says nothing
    lines += [line("B", 0, 5.0, strength=0.1)]
    assert ("B", 0.1) not in report.best_strength(report.by_row(lines, "RLVR"), ("a", "x"))  # not yet run at 0.3
