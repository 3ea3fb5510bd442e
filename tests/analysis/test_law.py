"""The entropy-performance law: its fit, its intervals, what lies above the curve, and the command."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from analysis import law
from support import config as configs
from support.report import t_quantile


def test_t_quantile_against_tables():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423), (100_000, 1.96)):
        assert t_quantile(0.975, freedom) == pytest.approx(value, abs=2e-4)
    assert t_quantile(0.95, 5) == pytest.approx(2.0150, abs=1e-4)


def test_fit_against_lstsq():
    rng = np.random.default_rng(0)
    for n in (3, 5, 40):
        H, R = rng.uniform(0.1, 1.0, n), rng.uniform(0, 1, n)
        design = np.stack([-np.exp(H), np.ones(n)], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, R, rcond=None)
        variance = ((R - design @ [a, b]) ** 2).sum() / (n - 2) * np.linalg.inv(design.T @ design)
        fit = law.fit_law(H, R)
        assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-9)
        t = t_quantile(0.975, n - 2)
        directions = {"a": [1, 0], "b": [0, 1], "b - a": [-1, 1]}
        for name, (value, half) in fit.intervals().items():
            d = np.array(directions[name])
            assert (value, half) == pytest.approx((d @ [a, b], t * math.sqrt(d @ variance @ d)), rel=1e-8)


def test_intervals_cover_what_they_should():
    """300 simulated runs of 6 points: a = 0.6, b = 1.2, and a second run on the same curve has no excess."""
    rng, hits, truth = np.random.default_rng(1), [], {"a": 0.6, "b": 1.2, "b - a": 0.6}

    def run():
        H = np.linspace(0.6, 0.2, 6)
        return H, 1.2 - 0.6 * np.exp(H) + 0.01 * rng.standard_normal(6)

    for _ in range(300):
        fit = law.fit_law(*run())
        inside = [abs(value - truth[name]) <= half for name, (value, half) in fit.intervals().items()]
        mean, error, t = law.excess(fit, *run())
        hits.append([*inside, abs(mean) <= t * error])
    assert ((0.88 <= np.mean(hits, axis=0)) & (np.mean(hits, axis=0) <= 0.99)).all(), np.mean(hits, axis=0)


def test_excess_finds_a_shift():
    H = np.linspace(0.6, 0.2, 8)
    fit = law.fit_law(H, 1.2 - 0.6 * np.exp(H) + 0.001 * (-1) ** np.arange(8))
    mean, error, t = law.excess(fit, H, 1.25 - 0.6 * np.exp(H))
    assert mean == pytest.approx(0.05, abs=0.002) and mean > t * error
    scatter = (1.25 - 0.6 * np.exp(H) - (fit.b - fit.a * np.exp(H))).std(ddof=1) / math.sqrt(8)
    assert error == pytest.approx(math.hypot(scatter, fit.at(np.exp(H).mean())[1]))
    assert law.excess(fit, H, 1.15 - 0.6 * np.exp(H))[0] == pytest.approx(-0.05, abs=0.002)


def test_excess_has_the_fewer_degrees_of_freedom():
    H, R = np.linspace(0.6, 0.2, 8), 1.2 - 0.6 * np.exp(np.linspace(0.6, 0.2, 8)) + 0.001 * (-1) ** np.arange(8)
    assert law.excess(law.fit_law(H, R), H[:3], R[:3])[2] == t_quantile(0.975, 2)  # of the other run's 3 points
    assert law.excess(law.fit_law(H[:4], R[:4]), H, R)[2] == t_quantile(0.975, 2)  # of the fit through 4


def write_run(folder: Path, shift: float = 0.0, points: int = 5):
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval/acc@16": 0.9, "eval/pass@1": 1.2 - 0.6 * math.exp(0.5), "eval/entropy": 0.5}]
    for i in range(1, points):
        H = 0.5 - 0.06 * i
        noise = 0.001 * (-1) ** i + shift
        rows += [{"step": 10 * i - 5, "loss": 0.1},
                 {"step": 10 * i, "eval/pass@1": 1.2 - 0.6 * math.exp(H) + noise, "eval/entropy": H}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/grpo"))
    write_run(Path("runs/up"), shift=0.05)
    write_run(Path("runs/down"), shift=-0.05)
    write_run(Path("runs/near-above"), shift=0.0004)  # by less than the 0.001 of noise
    write_run(Path("runs/near-below"), shift=-0.0004)
    names = ["runs/grpo", "runs/up", "runs/down", "runs/near-above", "runs/near-below"]
    pictures = []
    monkeypatch.setattr(law, "draw_law", lambda plot, runs, fits, draw=law.draw_law:
                        pictures.append((list(runs), list(fits))) or draw(plot, runs, fits))
    law.main([f"runs={','.join(names)}", "out=here"])
    assert pictures == [(names, names)]
    told = capsys.readouterr().out
    assert re.search(r"\| runs/grpo \| 5 \| 0\.500 -> 0\.260 \| .* \+0\.60\d ±0\.01\d", told.splitlines()[2])
    assert re.search(r"runs/up: its 4 points.* \+0\.0[45]\d+ .*: above it", told)
    assert re.search(r"runs/down: .* -0\.0[45]\d+ .*: below it", told)
    assert re.search(r"runs/near-above: .* \+0\.000\d+ .*: not beyond noise of it", told)
    assert re.search(r"runs/near-below: .* -0\.000\d+ .*: not beyond noise of it", told)
    assert "5 points are few" in told
    assert Path("here/law.png").stat().st_size > 10_000


def test_picture():
    """Every run's points, its curve between them and no further, and one band, which is the first run's."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(0, 0.5, 0.2), (10, 0.4, 0.32), (20, 0.3, 0.38), (30, 0.2, 0.48)]
    runs = {"first": points, "other": [(step, H, R + 0.05) for step, H, R in points]}
    fits = {name: law.fit_law(*zip(*[point[1:] for point in own])) for name, own in runs.items()}
    figure = law.draw_law(pyplot, runs, fits)
    (axis,), fit = figure.axes, fits["first"]
    curve, marks, other_curve, other_marks = axis.lines
    assert np.allclose(marks.get_xydata(), [point[1:] for point in points])
    assert np.allclose(other_marks.get_xydata()[:, 1] - marks.get_xydata()[:, 1], 0.05)
    along = curve.get_xdata()
    assert np.allclose(curve.get_ydata(), fit.b - fit.a * np.exp(along)) and (along[0], along[-1]) == (0.2, 0.5)
    assert np.allclose(other_curve.get_ydata() - curve.get_ydata(), 0.05)
    assert axis.get_xlim()[0] > 0.15 and axis.get_ylim()[1] < 0.6  # zoomed to the points
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    for H in (0.2, 0.5):
        value, error = fit.at(math.exp(H))
        here = corners[corners[:, 0] == H, 1]
        assert (here.min(), here.max()) == pytest.approx((value - t_quantile(0.975, 2) * error,
                                                          value + t_quantile(0.975, 2) * error))
    pyplot.close(figure)


def test_runs_that_cannot_be_fitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("two"), points=2)
    with pytest.raises(configs.UserError, match="two: 2 evaluations"):
        law.evaluation_points("two")
    Path("two/metrics.jsonl").write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(configs.UserError, match="two/metrics.jsonl, line 2 is not JSON"):
        law.evaluation_points("two")
    row = {"step": 0, "eval/acc@16": 0.2, "eval/entropy": 0.5}
    Path("two/metrics.jsonl").write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(configs.UserError, match="entropy never changed"):
        law.evaluation_points("two")
    Path("two/metrics.jsonl").write_text("\n".join(json.dumps(row | {"eval/entropy": h}) for h in (0.3, 0.2, 0.1)))
    assert law.evaluation_points("two")[1] == (0, 0.2, 0.2)  # Acc@n where there is no Pass@1
    both = [{"step": 0, "eval/acc@16": 0.2, "eval/pass@1": 0.3, "eval/entropy": h} for h in (0.3, 0.2, 0.1)]
    Path("two/metrics.jsonl").write_text("\n".join(json.dumps(row) for row in both))
    assert law.evaluation_points("two")[1] == (0, 0.2, 0.3)


@pytest.mark.parametrize("arguments, words", [
    ([], "give runs=FOLDER"), (["runs=nowhere"], "runs=nowhere: no metrics.jsonl"), (["step=3"], "unknown config key"),
    (["runs=run", "out=run/metrics.jsonl"], "out=run/metrics.jsonl is a file")])
def test_bad_input(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    with pytest.raises(configs.UserError) as error:
        law.main(arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_as_a_command_an_error_is_one_line_and_exit_code_2(tmp_path):
    """And it takes no torch, which would take seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run([sys.executable, "-m", "analysis.law", "runs=nowhere"], cwd=tmp_path, capture_output=True,
                            text=True, timeout=60, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ") and "runs=nowhere" in result.stderr
