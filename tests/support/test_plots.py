"""Pictures say what the figures say: values read back from the axes, and colours that can be told apart."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
import yaml

import reproduce
from support import plots
from support.config import UserError

matplotlib.use("Agg")
from matplotlib import colors, pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def edges(band) -> dict[float, tuple[float, float]]:
    """{x: (low, high)} of a band."""
    corners = band.get_paths()[0].vertices
    return {x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in set(corners[:, 0])}


def words_of(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# ---------------------------------------------------------------- colours


def test_one_colour_a_method_and_none_twice():
    assert plots.colours(["SCOPE", "GRPO"]) == [plots.COLOURS["SCOPE"], plots.COLOURS["GRPO"]]
    names = ["?", "SCOPE", "scope", "base model", "another"]
    found = plots.colours(names)
    assert found[1] == plots.COLOURS["SCOPE"] and found[3] == plots.COLOURS["base model"] and len(set(found)) == 5
    assert len(plots.colours(["?"] * 99)) == 99  # more than there are


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear sRGB to CIE Lab, in which distances are differences that one sees."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x, y, z = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


SIGHT = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_a_picture_can_be_told_apart(sight):
    """Also by the colour-blind, for every row of every experiment; 2.3 is a difference that is just seen."""
    def seen(colour):
        rgb = np.array(colors.to_rgb(colour))
        return lab(np.clip(SIGHT[sight] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1))

    lambdas = {"RLVR": "selection.kl_coef=0.03", "RLIF": "selection.kl_coef=0.3"}
    for experiment in reproduce.EXPERIMENTS.values():
        for rows in experiment.rows(lambdas).values():
            names = {row.label.removesuffix(" + SCOPE") for row in rows}
            assert names <= plots.COLOURS.keys()
            for one, other in itertools.combinations(names, 2):
                assert np.linalg.norm(seen(plots.COLOURS[one]) - seen(plots.COLOURS[other])) > 10, (one, other)


def test_method_of_a_run(tmp_path):
    """By what it was trained with; a name in COLOURS, the same for a run and the model in it."""
    for words, name in (({}, "grpo"), ({"selection": {"strategy": "none"}}, "grpo"),
                        ({"selection": {"strategy": "uniform"}, "reward": {"kind": "self_certainty"}}, "uniform"),
                        ({"selection": {"strategy": "none"}, "reward": {"kind": "token_entropy"}}, "token_entropy"),
                        ({"objective": "kl_cov", "selection": {"strategy": "none"}}, "kl_cov")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(words | {"steps": 3}))
        assert plots.method_of(str(tmp_path)) == plots.method_of(f"{tmp_path}/model") == name
    assert plots.method_of("owner/name") == "base model" and "base model" in plots.COLOURS


# ---------------------------------------------------------------- Pass@k of models


def test_pass_at_k_bands_are_95_percent():
    report = {"auto": {"m": {"pass@1": (0.5, 0.1), "pass@2": (0.7, 0.05), "majority@2": (0.1, 0.1)}}}
    figure = plots.pass_at_k(pyplot, report, {"auto": "5 problems x 2 samples"})
    (axis,) = figure.axes
    (curve,), (band,) = axis.lines, axis.collections
    assert curve.get_xydata().tolist() == [[1, 0.5], [2, 0.7]]
    assert edges(band) == {1: pytest.approx((0.304, 0.696)), 2: pytest.approx((0.602, 0.798))}
    assert axis.get_title() == "held-out Countdown\n5 problems x 2 samples" and "95 %" in words_of(figure)


def test_pass_at_k_and_the_differences_from_the_first():
    own = {"pass@1": (0.5, 0.1), "pass@2": (0.7, None)}
    gaps = {"pass@1": [0.1, -0.05, 0.2], "pass@2": [0.2, 0.1, 0.4], "entropy": [1.0, 0.5, 2.0]}
    report = {file: {"first": own, "runs/second/model": own | {"differences": gaps}} for file in ("a.jsonl", "b.jsonl")}
    figure = plots.pass_at_k(pyplot, report, {"a.jsonl": "", "b.jsonl": ""})
    above, _, below, _ = figure.axes
    (gap, zero), (band,) = below.lines, below.collections
    assert gap.get_xydata().tolist() == [[1, 0.1], [2, 0.2]] and zero.get_ydata()[0] == 0
    assert edges(band) == {1: (-0.05, 0.2), 2: (0.1, 0.4)}
    assert gap.get_color() == above.lines[1].get_color() != above.lines[0].get_color() == zero.get_color()
    assert above.get_title().startswith("a.jsonl") and "difference from first" in words_of(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


# ---------------------------------------------------------------- training curves


def run(folder, strategy: str, seed: int, values: list[float], heldout: float):
    """A run's folder, and its rows as read_metrics returns them."""
    folder.mkdir()
    keys = {"name": folder.name, "seed": seed, "selection": {"strategy": strategy}}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    rows = [{"step": step, "entropy": value} for step, value in enumerate(values, start=1)]
    held = [{"step": step, "eval/pass@1": heldout, "eval/pass@1_stderr": 0.01} for step in (0, len(values))]
    return str(folder), [held[0], *rows, held[1]]


def panel(figure, title: str):
    (axis,) = [axis for axis in figure.axes if axis.get_title() == title]
    return axis


def test_curves_of_runs(tmp_path):
    """Every step of a run, held-out points with 1.96 standard errors, and the colour of its method."""
    values = [math.exp(-step / 9) for step in range(30)]
    runs = dict([run(tmp_path / "one", "none", 0, values, 0.4), run(tmp_path / "two", "scope", 0, values[:8], 0.5)])
    figure = plots.training_curves(pyplot, runs)
    every, short = panel(figure, "entropy (nats)").lines
    assert every.get_xydata().tolist() == [[step, value] for step, value in enumerate(values, start=1)]
    assert short.get_xydata().tolist() == [[step, value] for step, value in enumerate(values[:8], start=1)]
    bars = panel(figure, "held-out Pass@1").collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [pytest.approx((0.3804, 0.4196))] * 2
    assert [bar[0, 0] for bar in bars] == [0, 30]
    assert every.get_color() == plots.COLOURS["GRPO"] and short.get_color() == plots.COLOURS["SCOPE"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert not panel(figure, "completion length (tokens)").lines


def test_runs_are_read_without_what_was_not_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": null, "loss": 2.0}\n')
    assert plots.read_runs([str(tmp_path)]) == {str(tmp_path): [{"step": 1, "loss": 2.0}]}
    with pytest.raises(UserError, match="nowhere: no metrics.jsonl"):
        plots.read_runs(["nowhere"])
