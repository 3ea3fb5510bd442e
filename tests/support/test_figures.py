"""Pictures over seeds: values read back from the axes."""

import math

import matplotlib
import pytest

from support import figures
from support.plots import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

T_2 = 4.302653  # Student's t, 97.5 %, 2 degrees of freedom
HALF = T_2 * 0.01 / math.sqrt(3)  # of three seeds that lie 0.01 apart


def line(section, row, seed, accuracy, breadth, strength=None):
    metrics = {"acc@2": accuracy, "pass@1": accuracy, "pass@2": breadth}
    base = metrics | {"pass@1": 0.1, "pass@2": 0.2}
    numbers = {"training": {"selection/fraction": strength or 0.0}, "base": {"a": base, "b": base},
               "trained": {"a": metrics, "b": metrics}}
    return {"section": section, "row": row, "strength": strength, "seed": seed, "figures": numbers,
            "config": {"data": "countdown"}}


def lines(*rows) -> list[dict]:
    return [line(section, row, seed, x + seed / 100, 2 * x, strength) for section in ("RLVR", "RLIF")
            for seed in (0, 1, 2) for row, strength, x in rows]


LINES = lines(("GRPO", None, 0.1), ("SCOPE", 0.1, 0.2), ("SCOPE", 0.3, 0.3))


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def caption(figure) -> str:
    return figure.get_supxlabel()


def test_bars_dots_and_whiskers():
    figure = figures.bars(pyplot, LINES)
    axis, _ = figure.axes
    assert [own.get_title() for own in figure.axes] == ["RLVR, with a verifier", "RLIF, without a verifier"]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.11, 0.11, 0.21, 0.21, 0.31, 0.31])
    dots = [own for own in axis.lines if own.get_marker() == "."]
    assert len(dots) == 6 and sorted(dots[0].get_ydata()) == pytest.approx([0.1, 0.11, 0.12])
    left, right = axis.patches[0].get_x(), axis.patches[0].get_x() + axis.patches[0].get_width()
    assert all(left < x < right for x in dots[0].get_xdata())
    whisker = axis.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert whisker == pytest.approx((0.11 - HALF, 0.11 + HALF))
    assert "3 seeds" in caption(figure) and "95 %" in caption(figure) and axis.get_ylabel().endswith("Countdown")


def test_a_twin_with_scope_has_the_colour_in_full():
    rows = (("Div", None, 0.1), ("Div + SCOPE", None, 0.2), ("KL-Cov", None, 0.3), ("KL-Cov + SCOPE", None, 0.2))
    axis = figures.bars(pyplot, lines(*rows)).axes[0]
    faces = [bar.get_facecolor() for bar in axis.patches[::2]]
    assert [face[:3] for face in faces] == [matplotlib.colors.to_rgb(COLOURS[name])
                                            for name in ("Div", "Div", "KL-Cov", "KL-Cov")]
    assert faces[0][3] < 0.3 < 0.7 < faces[1][3] and faces[2][3] < 0.3 < 0.7 < faces[3][3]


def test_frontier_has_a_panel_a_row_through_its_strengths():
    figure = figures.frontier(pyplot, [*LINES, *lines(("Uniform", 0.3, 0.25), ("Uniform", 0.1, 0.15))[:2]])
    assert [axis.get_title() for axis in figure.get_axes()] == 2 * ["SCOPE", "Uniform"]
    assert [part.get_suptitle() for part in figure.subfigs] == ["RLVR, with a verifier", "RLIF, without a verifier"]
    scope, uniform, _, empty = [{own.get_label(): own.get_xydata().round(6).tolist() for own in axis.lines
                                 if own.get_label()[0] != "_"} for axis in figure.get_axes()]
    both = {"base model": [[0.1, 0.2]], "GRPO": [[0.11, 0.2]], "SCOPE": [[0.21, 0.4], [0.31, 0.6]]}
    assert scope == both and uniform == both | {"Uniform": [[0.15, 0.3], [0.25, 0.5]]}  # in the order of strengths
    assert empty == both | {"Uniform": []}  # not run without a verifier
    own, other, _, _ = figure.get_axes()
    assert [text.get_text() for text in own.texts] == [text.get_text() for text in other.texts] == ["0.1", "0.3"]
    assert own.collections[0].get_segments()[0][:, 0] == pytest.approx((0.11 + 0.1 - HALF, 0.11 + 0.1 + HALF))
    assert legend(figure) == ["base model", "GRPO", "SCOPE"]
    assert "over 1 to 3 seeds" in caption(figure) and "95 %" in caption(figure)
    assert "over 3 seeds" in figures.intervals(LINES)
    near = figures.frontier(pyplot, [*LINES, *lines(("SCOPE", 0.5, 0.301))]).get_axes()[0]
    assert [text.get_text() for text in near.texts] == ["0.1", "0.3, 0.5"]
    assert 0.311 < near.get_xlim()[1] < 0.311 + HALF  # the points' limits, not those of their bars


def test_over_strength_begins_at_the_baseline():
    figure = figures.over_strength(pyplot, LINES)
    axis, _, below, _ = figure.axes
    assert axis.lines[0].get_xydata().round(6).tolist() == [[0, 0.11], [10, 0.21], [30, 0.31]]
    assert below.lines[0].get_xydata().round(6).tolist() == [[0, 0.2], [10, 0.4], [30, 0.6]]
    assert legend(figure) == ["base model", "SCOPE"] and below.get_ylabel() == "Pass@2, a"


def test_pass_at_k_over_seeds_and_its_difference():
    figure = figures.pass_at_k_over_seeds(pyplot, LINES)
    above, _, below, _ = figure.axes
    assert [own.get_label() for own in above.lines] == ["base model", "GRPO", "SCOPE, 0.1", "SCOPE, 0.3"]
    assert above.lines[0].get_ydata() == pytest.approx([0.1, 0.2])
    assert below.lines[0].get_ydata() == pytest.approx([0.1, 0.2])  # the second row less the first, seed by seed
    band = above.collections[0].get_paths()[0].vertices
    at_1 = band[band[:, 0] == 1, 1]
    assert (at_1.min(), at_1.max()) == pytest.approx((0.11 - HALF, 0.11 + HALF))
    assert below.get_title() == "SCOPE, 0.1 − GRPO, seed by seed" and "95 %" in caption(figure)


@pytest.mark.parametrize("draw", [figures.bars, figures.frontier, figures.pass_at_k_over_seeds])
def test_the_same_colour_everywhere(draw):
    """Of each method that is in a legend, on every panel of every picture."""
    strength = 0.3 if draw is figures.frontier else None
    rows = (("GRPO", None, 0.1), ("SCOPE", strength, 0.2), ("Uniform", strength, 0.3))
    for axis in draw(pyplot, lines(*rows)).get_axes():
        for handle, label in zip(*axis.get_legend_handles_labels()):
            colour = handle[0].get_facecolor() if hasattr(handle, "patches") else handle.get_color()
            if label != "base model" or draw is not figures.bars:  # there it is a dotted line
                assert matplotlib.colors.to_rgb(colour) == matplotlib.colors.to_rgb(COLOURS[label]), label
