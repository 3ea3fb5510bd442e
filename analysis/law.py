"""The entropy-performance law of Cui et al. 2025, R = -a e^H + b: do further runs lie above the first one's curve?

    python -m analysis.law runs=runs/grpo,runs/scope

A table goes to the terminal, a picture to out=analyses/.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import config as configs
from support import help, plots
from support.report import t_quantile
from support.tables import markdown_table

KEYS = {"runs": "", "out": "analyses"}


class Fit(NamedTuple):
    """Least squares of R = b - a x at x = e^H, and what its intervals are made of."""

    a: float
    b: float
    spread: float  # standard deviation of the residuals, n - 2 degrees of freedom
    n: int
    center: float  # mean of x
    width: float  # sum of (x - center)^2

    def at(self, x: float) -> tuple[float, float]:
        """The line's value at x = e^H and the standard error of that."""
        return self.b - self.a * x, self.spread * math.sqrt(1 / self.n + (x - self.center) ** 2 / self.width)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """a, b and the ceiling b - a, which is R at H = 0: value and half-width of the 95 % interval."""
        t = t_quantile(0.975, self.n - 2)
        slope = self.spread / math.sqrt(self.width)
        values = {"a": (self.a, slope), "b": self.at(0.0), "b - a": self.at(1.0)}
        return {name: (value, t * error) for name, (value, error) in values.items()}


def fit_law(entropy, performance) -> Fit:
    """R = -a e^H + b through points (H in nats, R), n >= 3, in closed form.  Cui et al. 2025, Eq. 1"""
    x, R = np.exp(np.asarray(entropy, dtype=float)), np.asarray(performance, dtype=float)
    center, width = x.mean(), ((x - x.mean()) ** 2).sum()
    a = -((x - center) * R).sum() / width
    b = R.mean() + a * center
    spread = math.sqrt(((R - b + a * x) ** 2).sum() / (len(x) - 2))
    return Fit(float(a), float(b), spread, len(x), float(center), float(width))


def excess(fit: Fit, entropy, performance) -> tuple[float, float, float]:
    """Mean signed residual of another run's n >= 2 points over a fitted curve, its standard error, and t at 97.5 %.

    The line is straight in e^H, so the mean residual is mean R less the line at mean e^H: its error is that of
    the points about their mean residual and that of the line at that place, which no more points would lessen.
    """
    x, R = np.exp(np.asarray(entropy, dtype=float)), np.asarray(performance, dtype=float)
    residual = R - (fit.b - fit.a * x)
    error = math.hypot(residual.std(ddof=1) / math.sqrt(len(x)), fit.at(float(x.mean()))[1])
    return float(residual.mean()), error, t_quantile(0.975, min(len(x) - 1, fit.n - 2))


def evaluation_points(folder: str) -> list[tuple[int, float, float]]:
    """(step, H, R) of every evaluation in a run's metrics.jsonl: entropy in nats, Pass@1 or else Acc@n."""
    file, points = Path(folder) / "metrics.jsonl", []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise configs.UserError(f"{file}, line {number} is not JSON: remove that line") from None
        names = [name for name in row if name == "eval/pass@1"] + [name for name in row if name.startswith("eval/acc")]
        if names and "eval/entropy" in row:
            points.append((row["step"], row["eval/entropy"], row[names[0]]))
    configs.require(len(points) >= 3, f"runs={folder}: {len(points)} evaluations in metrics.jsonl, and a line through "
                                      "fewer than 3 points has no error; train with evaluation.every=10")
    configs.require(len({entropy for _, entropy, _ in points}) > 1, f"runs={folder}: its entropy never changed")
    return points


def law_keys(arguments: list[str]) -> dict:
    keys = configs.override(KEYS, arguments)
    configs.require(keys["runs"] != "", "give runs=FOLDER,FOLDER: runs of train.py, such as runs=runs/grpo,runs/scope")
    configs.require(not Path(keys["out"]).is_file(), f"out={keys['out']} is a file: give a folder")
    for folder in configs.listed(keys["runs"]):
        configs.require((Path(folder) / "metrics.jsonl").is_file(),
                        f"runs={folder}: no metrics.jsonl there; give folders of runs, runs=runs/a,runs/b")
    return keys


def main(arguments: list[str]) -> None:
    help.answer(arguments, __doc__, KEYS)
    config = configs.namespace(law_keys(arguments))
    runs = {folder: evaluation_points(folder) for folder in configs.listed(config.runs)}
    fits = {name: fit_law(*zip(*[point[1:] for point in points])) for name, points in runs.items()}
    lines = [["R = -a e^H + b", "points", "H", "R", "a", "b", "ceiling b - a"]]
    for name, points in runs.items():
        _, H, R = zip(*points)
        lines.append([name, str(len(points)), f"{H[0]:.3f} -> {H[-1]:.3f}", f"{R[0]:.3f} -> {R[-1]:.3f}",
                      *(f"{value:+.3f} ±{half:.3f}" for value, half in fits[name].intervals().values())])
    few = min(map(len, runs.values()))
    print(markdown_table(lines[0], lines[1:]))
    print("± is half the 95 % interval (Student's t). A run's points follow from each other, so it is too narrow if "
          "anything" + (f"; {few} points are few: evaluation.every=10 gives more" if few < 10 else "") + ".")
    first = next(iter(runs))
    for name in list(runs)[1:]:
        # Before its first step a run is on nobody's curve: twins share that point, and it is left out.
        later = [point[1:] for point in runs[name] if point[0] > 0]
        mean, error, t = excess(fits[first], *zip(*later))
        side = "above" if mean > t * error else "below" if mean < -t * error else "not beyond noise of"
        print(f"{name}: its {len(later)} points after step 0 lie {mean:+.4f} ±{error:.4f} (standard error) from the "
              f"curve of {first}: {side} it at 95 %")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    print(plots.picture(out / "law.png", lambda plot: draw_law(plot, runs, fits)))


def draw_law(plot, runs: dict, fits: dict):
    """The points of each run and its curve between them; the ceilings, far off at H = 0, are in the table."""
    figure, axis = plot.subplots(figsize=(7.5, 4.8), layout="constrained")
    names = list(runs)
    for name, colour in zip(names, plots.colours([plots.method_of(name) for name in names])):
        _, H, R = map(np.array, zip(*runs[name]))
        along = np.linspace(H.min(), H.max(), 100)
        value, error = np.array([fits[name].at(x) for x in np.exp(along)]).T
        axis.plot(along, value, color=colour, linewidth=1.5)
        if name == names[0]:
            half = t_quantile(0.975, fits[name].n - 2) * error
            axis.fill_between(along, value - half, value + half, color=colour, alpha=0.15, linewidth=0)
        axis.plot(H, R, "o", color=colour, markersize=5, label=plots.short_name(name))
        axis.annotate(f"step {runs[name][-1][0]}", (H[-1], R[-1]), color=colour, fontsize=8, xytext=(0, -14),
                      textcoords="offset points", ha="center")
    axis.set(xlabel="entropy H (nats); a run goes from right to left as it falls", ylabel="held-out accuracy R",
             title="entropy-performance law R = -a e$^H$ + b")
    axis.legend()
    plots.caption(figure, f"Band: 95 % interval of the curve of {plots.short_name(names[0])}")
    return figure


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1:])
