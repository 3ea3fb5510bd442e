"""Pictures show the numbers that they should: values read back from the axes."""

import itertools
import json
import math
import sys

import matplotlib
import pytest

from paper import figures
from support.config import UserError

matplotlib.use("Agg")
from matplotlib import colors, pyplot  # noqa: E402

HALF = 4.302653 * 0.01 / math.sqrt(3)  # Student's interval of three seeds that lie 0.01 apart


def make_run(section, row, seed, accuracy, breadth, strength=None):
    metrics = {"acc@2": accuracy, "pass@1": accuracy, "pass@2": breadth}
    base = metrics | {"pass@1": 0.1, "pass@2": 0.2}
    validation = {"validation": {"pass@1": strength or 0.0}}
    return {
        "section": section,
        "row": row,
        "strength": strength,
        "seed": seed,
        "figures": {
            "training": {"selection/fraction": strength or 0.0},
            "base": {"a": base, "b": base} | validation,
            "trained": {"a": metrics, "b": metrics} | validation,
        },
    }


def make_runs(*rows) -> list[dict]:
    runs = []
    for section, seed, (row, strength, x) in itertools.product(("RLVR", "RLIF"), (0, 1, 2), rows):
        runs.append(make_run(section, row, seed, x + seed / 100, 2 * x, strength))
    return runs


RUNS = make_runs(("GRPO", None, 0.1), ("SCOPE", 0.1, 0.2), ("SCOPE", 0.3, 0.3))


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def whisker(container, axis: int) -> list[float]:
    """Return the two ends of an error bar along x (0) or y (1)."""
    return container.lines[2][0].get_segments()[0][:, axis].tolist()


def test_bars_and_whiskers():
    figure = figures.bars(pyplot, RUNS)
    titles = ["RLVR, with a verifier", "RLIF, without a verifier"]
    assert [panel.get_title() for panel in figure.axes] == titles
    axis = figure.axes[0]
    heights = [0.1, 0.1, 0.11, 0.11, 0.21, 0.21, 0.31, 0.31]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(heights)
    grpo = axis.containers[3]
    assert whisker(grpo, 1) == pytest.approx([0.11 - HALF, 0.11 + HALF])
    assert "3 seeds" in figure.get_supxlabel() and "95 %" in figure.get_supxlabel()


def test_a_twin_with_scope_has_the_color_in_full():
    names = ("Div", "Div + SCOPE", "KL-Cov", "KL-Cov + SCOPE")
    axis = figures.bars(pyplot, make_runs(*((name, None, 0.2) for name in names))).axes[0]
    _, *faces = [bar.get_facecolor() for bar in axis.patches[::2]]
    assert faces[0][:3] == faces[1][:3] != faces[2][:3] == faces[3][:3]
    assert [face[3] for face in faces] == [0.3, 1, 0.3, 1]


def test_frontier_has_a_point_per_row_at_its_best_strength():
    runs = [*RUNS, *make_runs(("Uniform", 0.3, 0.25), ("Uniform", 0.1, 0.15))]
    handles, labels = figures.frontier(pyplot, runs).axes[0].get_legend_handles_labels()
    assert labels == ["base model", "GRPO", "SCOPE, 0.3", "Uniform, 0.3"]
    points = [tuple(handle.lines[0].get_xydata()[0]) for handle in handles]
    assert points == [
        pytest.approx(point) for point in ((0.1, 0.2), (0.11, 0.2), (0.31, 0.6), (0.26, 0.5))
    ]
    assert whisker(handles[1], 0) == pytest.approx([0.11 - HALF, 0.11 + HALF])
    assert len({handle.lines[0].get_marker() for handle in handles}) == 4
    shades = [colors.to_hex(handle.lines[0].get_color()) for handle in handles]
    assert len(set(shades)) == 4


def test_over_shares():
    """A row without a penalty is a level, and the others are at the share that they selected."""
    above, _, below, _ = figures.over_shares(pyplot, RUNS).axes
    _, grpo, scope = above.lines
    assert grpo.get_xydata().round(6).tolist() == [[1, 0.11], [100, 0.11]]
    assert scope.get_xydata().round(6).tolist() == [[10, 0.21], [30, 0.31]]
    assert below.lines[2].get_xydata().round(6).tolist() == [[10, 0.4], [30, 0.6]]
    labels = [text.get_text() for text in below.get_legend().get_texts()]
    assert labels == ["base model", "GRPO", "SCOPE"]
    assert above.get_ylabel() == "Pass@1, a" and below.get_ylabel() == "Pass@2, a"


def test_pass_at_k_and_the_difference_of_its_rows():
    runs = make_runs(("GRPO", None, 0.1), ("SCOPE", None, 0.2))
    above, _, below, _ = figures.pass_at_k(pyplot, runs).axes
    assert [line.get_label() for line in above.lines] == ["base model", "GRPO", "SCOPE"]
    assert above.lines[0].get_ydata() == pytest.approx([0.1, 0.2])
    assert below.lines[0].get_ydata() == pytest.approx([0.1, 0.2])
    band = above.collections[1].get_paths()[0].vertices
    at_1 = band[band[:, 0] == 1, 1]
    assert (at_1.min(), at_1.max()) == pytest.approx((0.11 - HALF, 0.11 + HALF))
    assert below.get_title() == "SCOPE − GRPO, seed by seed"


def test_training_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count in (("one", 30), ("two", 8)):
        rows = [{"step": 0, "eval/pass@1": 0.4}]
        for step in range(1, count + 1):
            rows.append({"step": step, "entropy": 1 / step, "kl/selected": None})
        (tmp_path / name).mkdir()
        file = tmp_path / name / "metrics.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = figures.training_curves(pyplot, ["one", "two"])
    panels = {axis.get_title(): axis for axis in figure.axes}
    curve = panels["entropy (nats)"].lines[0]
    assert curve.get_xydata().tolist() == [[step, 1 / step] for step in range(1, 31)]
    assert panels["held-out Pass@1"].lines[0].get_xydata().tolist() == [[0, 0.4]]
    figures.main(["one", "two"])
    assert capsys.readouterr().out == "written: training_curves.png\n"
    assert (tmp_path / "training_curves.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="nowhere: there is no metrics.jsonl"):
        figures.main(["nowhere"])


def test_without_matplotlib_one_line_says_how(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.picture(tmp_path / "x.png", None, []) == "no x.png: pip install matplotlib"
