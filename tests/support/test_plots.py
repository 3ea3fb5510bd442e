"""Pictures say what the figures say: values read back from the axes."""

import matplotlib
import pytest

from support import plots

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def line(section, row, seed, accuracy, breadth, strength=None):
    metrics = {"acc@2": accuracy, "pass@1": accuracy, "pass@2": breadth}
    base = metrics | {"pass@1": 0.1, "pass@2": 0.2}
    figures = {"training": {"selection/fraction": strength or 0.0}, "base": {"a": base, "b": base},
               "trained": {"a": metrics, "b": metrics}}
    return {"section": section, "row": row, "strength": strength, "seed": seed, "figures": figures}


LINES = [line(section, row, seed, x + seed / 100, 2 * x, strength) for section in ("RLVR", "RLIF") for seed in (0, 1, 2)
         for row, strength, x in (("base", None, 0.1), ("A", 0.1, 0.2), ("A", 0.3, 0.3))]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def test_pass_at_k_bands_are_95_percent():
    report = {"auto": {"m": {"pass@1": (0.5, 0.1), "pass@2": (0.7, 0.05)}}}
    (axis,) = plots.pass_at_k(pyplot, report).axes
    (curve,), (band,) = axis.lines, axis.collections
    assert curve.get_xydata().tolist() == [[1, 0.5], [2, 0.7]]
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert {(1, 0.304), (1, 0.696), (2, 0.602), (2, 0.798)} <= corners  # 0.5 ± 0.196, 0.7 ± 0.098


def test_bars_and_dots():
    axes = plots.bars(pyplot, LINES).axes
    assert [axis.get_title() for axis in axes] == ["RLVR", "RLIF"]
    heights = [round(bar.get_height(), 6) for bar in axes[0].patches]
    assert heights == [0.11, 0.11, 0.21, 0.21, 0.31, 0.31]  # means over seeds, of each row on each benchmark
    dots = axes[0].lines[0].get_ydata().tolist()
    assert dots == pytest.approx([0.1, 0.11, 0.12])


def test_frontier_goes_through_the_strengths():
    axis = plots.frontier(pyplot, LINES).axes[1]
    curves = {curve.get_label(): curve.get_xydata().round(6).tolist() for curve in axis.lines}
    assert curves == {"base": [[0.11, 0.2]], "A": [[0.21, 0.4], [0.31, 0.6]]}


def test_over_strength_begins_at_the_baseline():
    axis = plots.over_strength(pyplot, LINES).axes[0]
    assert axis.lines[0].get_xydata().round(6).tolist() == [[0, 0.11], [10, 0.21], [30, 0.31]]


def test_pass_at_k_over_seeds_and_its_difference():
    above, _, below, _ = plots.pass_at_k_over_seeds(pyplot, LINES).axes
    assert [curve.get_label() for curve in above.lines] == ["base model", "base", "A, 0.1", "A, 0.3"]
    assert above.lines[0].get_ydata() == pytest.approx([0.1, 0.2])
    assert below.lines[0].get_ydata() == pytest.approx([0.1, 0.2])  # the second row less the first, seed by seed
