"""The choice of settings, the bootstrap against variances, and the tables by hand arithmetic."""

import numpy as np
import pytest
from helpers import reported_run, tuning_run

from paper import tables


def cells_of(page: str) -> dict[str, list]:
    """Return {first cell: the other cells of each line that begins with it}."""
    cells: dict[str, list] = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            cells.setdefault(first, []).append(rest)
    return cells


def test_the_choice_is_the_highest_mean_over_tuning_seeds():
    runs = [
        tuning_run("GRPO", 1, 0, 5, step20=0.5, step40=0.1),
        tuning_run("GRPO", 1, 0, 6, step20=0.1, step40=0.4),
        tuning_run("GRPO", 2, 0, 5, step20=0.2, step40=0.2),
        tuning_run("GRPO", 2, 0, 6, step20=0.2, step40=0.2),
        tuning_run("SCOPE", 1, 0.3, 5, step20=0.2, step40=0.3),
        tuning_run("SCOPE", 1, 0.1, 5, step20=0.2, step40=0.4),
        {"stage": "test", "method": "SCOPE"},
    ]
    assert tables.choose(runs) == {"GRPO": ("GRPO", 1, 0, 20), "SCOPE": ("SCOPE", 1, 0.1, 40)}
    assert tables.choose(runs, "pass@16")["GRPO"][1] == 2


def test_the_bootstrap_knows_both_sources():
    """Seeds and problems that differ each widen the interval, as the variances say."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(size=(6, 1))
    problems = rng.normal(size=(1, 40))
    for values, error in (
        (seeds + 0 * problems, seeds.std(ddof=1) / 6**0.5),
        (1.095 * problems + 0 * seeds, 1.2 * problems.std() / 40**0.5),  # the stretch, on both
        (seeds + problems, (seeds.var(ddof=1) / 6 + 1.2 * problems.var() / 40) ** 0.5),
    ):
        mean, low, high = tables.interval(values)
        assert mean == pytest.approx(values.mean())
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
        _, lower, higher = tables.interval(values, comparisons=10)
        assert higher - lower == pytest.approx(2 * 2.81 * error, rel=0.12)  # of 0.5 %


def test_the_page_by_hand():
    runs = [
        tuning_run("GRPO", 1e-5, 0.0, 5, step20=0.5, step40=0.1),  # 40: the choice by Pass@16
        tuning_run("SCOPE", 1e-5, 0.1, 5, step20=0.25),
    ]
    runs.append(tuning_run("SCOPE", 1e-5, 0.3, 5, step20=0.125))  # the choice by Pass@16
    for seed in (0, 1):
        runs += [reported_run("GRPO", seed, [1, 1]), reported_run("SCOPE", seed, [2, 2], coef=0.1)]
        runs += [reported_run("SCOPE", seed, [1, 4], coef=0.3)]
        runs += [reported_run("GRPO", seed, [1, 0], steps=40)]
    cells = cells_of(tables.page("x", runs))
    chosen, chosen_by_16, rates, first, second = cells["SCOPE"]
    assert chosen == ["1e-05", "0.1", "20", "0.250", "0.750", "0.250", "0.500"]
    assert chosen_by_16[1] == "0.3"
    assert rates == ["0.250 / 0.750", ""]
    assert cells["GRPO"][2] == ["0.500 / 0.500", "0.100 / 0.900"]
    assert cells["base model"][0][:3] == ["2", "0.000 [0.000, 0.000]", "0.000 [0.000, 0.000]"]
    assert cells["GRPO"][3][1] == "0.250 [0.250, 0.250]"
    assert cells["GRPO"][3][3].startswith("0.150 [0.")
    assert first[1] == "0.500 [0.500, 0.500]" and second[1].startswith("0.625 [")
    assert cells["SCOPE − GRPO"][0] == ["+0.250 [+0.250, +0.250] *", "+0.000 [+0.000, +0.000]"]
    assert not cells["SCOPE − GRPO"][1][0].endswith("*")  # two problems that disagree
    assert cells["SCOPE − base model"][0][0] == "+0.500 [+0.500, +0.500] *"
    (by_16,) = cells["GRPO by Pass@16 − GRPO"]
    assert by_16[0].startswith("-0.125 [") and cells["GRPO"][4] == cells["GRPO by Pass@16"][0]


def test_gains():
    """Two seeds and two problems; the base model solves the first problem of seed 0 only."""
    runs = [reported_run("GRPO", 0, [0, 1]), reported_run("GRPO", 1, [2, 4])]
    runs[0]["test"]["file"]["correct"]["base"] = [2, 0]
    # gains in Pass@1: (0 + 1 - 2) / 8 and (2 + 4) / 8; three of four are new, one is lost
    spread = (0.75 + 0.125) / 2**0.5
    assert tables.gains(runs, "file", "trained") == [f"{spread:.3f}", "0.750", "0.250"]
    assert tables.gains(runs, "file", "base") == ["0.000"] * 3
    assert tables.gains(runs[:1], "file", "trained") == ["0.000", "0.500", "0.500"]


def test_what_is_compared():
    methods = ["GRPO", "SCOPE", "Uniform", "Div", "Div + SCOPE"]
    assert [f"{one} - {other}" for one, other in tables.pairs_of(methods)] == [
        "GRPO - base model",
        "SCOPE - base model",
        "SCOPE - GRPO",
        "Uniform - GRPO",
        "Div - GRPO",
        "Uniform - SCOPE",
        "Div - SCOPE",
        "Div + SCOPE - Div",
    ]


def test_a_star_is_corrected_for_the_number_of_differences():
    """A difference whose own interval barely excludes 0 has no star among many."""
    counts = [1] * 12 + [2] * 8
    counts[0] = 0
    methods = {}
    for method, correct in (("GRPO", [1] * 20), ("SCOPE", counts)):
        methods[method] = [reported_run(method, seed, correct) for seed in range(6)]
    gap = tables.pass_values(methods["SCOPE"], "file", "trained", 1) - 0.25
    assert tables.interval(gap)[1] > 0 > tables.interval(gap, comparisons=20)[1]
    pair = ("SCOPE", "GRPO")
    assert "] *" in tables.differences_table(methods, [pair], "file", [1])
    assert "] *" not in tables.differences_table(methods, [pair] * 20, "file", [1])
