"""Pictures show the numbers that they should: values read back from the axes."""

import sys

import matplotlib
import pytest
from helpers import reported_run, tuning_run

from paper import figures

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

RUNS = [
    tuning_run("GRPO", 1e-5, 0.0, 5, step20=0.5, step40=0.25),
    tuning_run("SCOPE", 1e-5, 0.1, 5, step20=0.375),
]
for number in (0, 1, 2):
    for method, correct, strength in (("GRPO", [1, 1], 0.0), ("SCOPE", [2, 2], 0.1)):
        run = reported_run(method, number, correct, coef=strength)
        RUNS.append(run)


def with_64_samples(runs: list[dict]) -> list[dict]:
    """Return the test runs as if they had 64 samples of each problem of 4-numbers."""
    test = [run for run in runs if run["stage"] == "test"]
    return [run | {"test": {"4-numbers": run["test"]["file"] | {"samples": 64}}} for run in test]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def test_every_setting_is_a_point_and_the_choices_are_large():
    figure = figures.settings_picture(pyplot, RUNS)
    pass_16, one, other = [axis.collections for axis in figure.axes]
    points = [tuple(point.get_offsets()[0].tolist()) for point in pass_16]
    assert sorted(points) == [(0.25, 0.75), (0.375, 0.625), (0.5, 0.5)]
    assert [len(one), len(other)] == [3, 3]
    assert tuple(one[0].get_offsets()[0].tolist()) == (0.5, 0.5)  # d_collapse, Pass@1
    large = [point.get_label() for point in pass_16 if point.get_sizes()[0] > 50]
    assert sorted(large) == ["GRPO", "SCOPE"]
    assert figures.color_of("GRPO", []) == "black" and figures.color_of("x", ["y", "x"]) == "C1"


def test_pass_at_k_and_the_difference():
    above, below = figures.pass_at_k(pyplot, RUNS).axes
    assert [line.get_label() for line in above.lines] == ["base model", "GRPO", "SCOPE"]
    assert above.lines[1].get_xydata().round(6).tolist() == [[1, 0.25], [2, 0.5], [4, 1.0]]
    assert below.lines[0].get_ydata() == pytest.approx([0.25, 5 / 6 - 0.5, 0.0])
    assert above.get_title() == "file"


def test_shares_are_drawn_for_each_lambda_against_grpo():
    runs = [run for run in RUNS if run["stage"] == "test" and run["method"] == "GRPO"]
    for coef, share, correct in (
        (0.1, 1, [2, 1]),
        (0.1, 50, [4, 4]),
        (0.3, 1, [3, 4]),
        (0.3, 50, [0, 0]),
    ):
        runs += [reported_run(f"λ = {coef}, q = {share} %", seed, correct) for seed in (0, 1, 2)]
    assert list(figures.pictures_of(runs)) == ["shares.png"]
    one, four, collapse = figures.shares_picture(pyplot, runs).axes
    assert [line.get_label() for line in one.lines] == ["λ = 0.1", "λ = 0.3", "GRPO"]
    # GRPO's Pass@1 is 0.25 and its Pass@4 is 1
    assert one.lines[0].get_xydata().tolist() == [[1, 0.125], [50, 0.75]]
    assert one.lines[1].get_ydata().tolist() == [0.625, -0.25]
    assert four.lines[1].get_ydata().tolist() == [0.0, -1.0]
    assert collapse.get_title() == "d_collapse, difference to GRPO" and len(collapse.lines) == 3


def test_sizes_are_compared_with_the_base_model_and_with_grpo():
    other = [run for run in RUNS if run["method"] == "GRPO"]
    other += [run | {"method": "SCOPE"} for run in other]
    figure = figures.sizes_picture(
        pyplot, {"one": with_64_samples(RUNS), "two": with_64_samples(other)}
    )
    base, grpo = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["SCOPE − the base model", "SCOPE − GRPO"]
    assert [line.get_label() for line in base.lines[::2]] == ["one", "two"]
    assert base.lines[0].get_ydata()[0] == pytest.approx(2 / 64)  # no sample of the base is correct
    assert grpo.lines[0].get_ydata()[[0, -1]] == pytest.approx([1 / 64, 0])
    assert not grpo.lines[2].get_ydata().any()


def test_a_study_has_the_pictures_that_it_can_have():
    everything = ["settings.png", "pass_at_k.png"]
    assert list(figures.pictures_of(RUNS)) == everything
    assert list(figures.pictures_of(RUNS[:2])) == everything[:1]
    assert list(figures.pictures_of(RUNS[2::2])) == []
    assert list(figures.pictures_of(RUNS[:-1])) == everything[:1]  # a seed is still missing


def test_without_matplotlib_one_line_says_how(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figures.picture(tmp_path / "x.png", None, []) == "no x.png: pip install matplotlib"
