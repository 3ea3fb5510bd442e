"""Draw the pictures of `paper.reproduce`, and the training curves of runs.

    python -m paper.figures runs/a runs/b      # training curves, to training_curves.png

`runs` are lines of runs.jsonl, as in paper.tables; a section (with or without a verifier) is a
column of panels. matplotlib is imported only when something is drawn; `plot` is matplotlib.pyplot.
"""

import sys
from pathlib import Path

import numpy as np

from paper.tables import (
    base_row,
    best_strengths,
    differences,
    files_and_metrics,
    group_by_row,
    over_seeds,
    row_label,
    t_test,
)
from support.config import one_line_errors, require
from support.files import read_jsonl

STYLE = {
    "savefig.dpi": 160,
    "legend.fontsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
TITLES = {"RLVR": "RLVR, with a verifier", "RLIF": "RLIF, without a verifier"}
COLORS = {"base model": "darkgray", "GRPO": "black", "INTUITOR": "black", "SCOPE": "royalblue"}
MARKERS = "*os^vD<>pPXh"


def picture(path: Path, draw, content) -> str:
    """Save the figure draw(pyplot, content), and return the line to print."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure = draw(pyplot, content)
        figure.savefig(path)
        pyplot.close(figure)
    return f"written: {path}"


def panels(plot, runs: list[dict], count: int = 1) -> tuple:
    """Make a figure with a column of panels for each section.

    Returns the figure, and a list of (panels, rows of the section, the base model's first).
    """
    sections = list(dict.fromkeys(run["section"] for run in runs))
    size = (11, 2 + 3 * count)
    figure, axes = plot.subplots(
        count, len(sections), figsize=size, squeeze=False, layout="constrained"
    )
    seeds = len({run["seed"] for run in runs})
    figure.supxlabel(f"95 % intervals over {seeds} seeds (Student)", fontsize=9)
    columns = []
    for column, section in zip(axes.T, sections):
        column[0].set_title(TITLES[section])
        columns.append((column, base_row(runs) | group_by_row(runs, section)))
    return figure, columns


def style_of(row: tuple, rows: dict) -> dict:
    """Return color and label of a row of a panel; a row "X + SCOPE" has the color of X."""
    methods = list(dict.fromkeys(label.removesuffix(" + SCOPE") for label, _ in rows))
    method = row[0].removesuffix(" + SCOPE")
    color = COLORS.get(method, f"C{methods.index(method)}")
    return {"color": color, "label": row_label(row)}


def method_style(method: str, methods) -> dict:
    """Return the color of a method among others."""
    return {"color": COLORS.get(method, f"C{list(methods).index(method)}")}


def legend_below(axis) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def draw_band(axis, x: list, points: list[tuple], style: dict) -> None:
    """Draw a line through the means of points (mean, half), and the band mean ± half."""
    means, halves = np.array(points).T
    axis.plot(x, means, marker=".", **style)
    axis.fill_between(x, means - halves, means + halves, color=style["color"], alpha=0.18)


# ---------------------------------------------------------------- the paper's figures


def bars(plot, runs: list[dict]):
    """Draw a bar per row for Pass@1 on each file (Figure 2), pale if "+ SCOPE" is beside it."""
    files, _ = files_and_metrics(runs)
    figure, columns = panels(plot, runs)
    for (axis,), rows in columns:
        width = 0.8 / len(rows)
        for i, (row, by_seed) in enumerate(rows.items()):
            points = [over_seeds(by_seed, ("trained", file, "pass@1")) for file in files]
            means, halves = np.array(points).T
            x = np.arange(len(files)) + i * width
            alpha = 0.3 if (f"{row[0]} + SCOPE", None) in rows else 1.0
            axis.bar(x, means, 0.9 * width, alpha=alpha, **style_of(row, rows))
            axis.errorbar(x, means, halves, fmt="none", ecolor="dimgray", capsize=2)
        axis.set_xticks(np.arange(len(files)) + 0.4 - width / 2, files)
        axis.set_ylabel("held-out Pass@1")
        axis.set_ylim(bottom=0)  # an interval may reach below
        legend_below(axis)
    return figure


def over_shares(plot, runs: list[dict]):
    """Draw Pass@1 and the largest Pass@k against the share of tokens that paid (Figure 1).

    The share is less than was asked for if too few tokens have a score above 0.
    """
    files, metrics = files_and_metrics(runs)
    figure, columns = panels(plot, runs, 2)
    for axes, rows in columns:
        for axis, metric in zip(axes, (metrics[0], metrics[-1])):
            path = ("trained", files[0], metric)
            for form in dict.fromkeys(label for label, _ in rows):
                of_form = [by_seed for row, by_seed in rows.items() if row[0] == form]
                points = [over_seeds(by_seed, path) for by_seed in of_form]
                if (form, None) in rows:  # without a penalty: a horizontal line
                    x = [1, 100]
                    points *= 2
                else:
                    fraction = ("training", "selection/fraction")
                    x = [100 * over_seeds(by_seed, fraction)[0] for by_seed in of_form]
                draw_band(axis, x, points, style_of((form, None), rows))
            axis.set_xscale("log")
            ticks = [1, 2, 5, 10, 20, 50, 100]
            axis.set_xticks(ticks, ticks)
            axis.set(xlabel="% of tokens that pay", ylabel=f"{metric.title()}, {files[0]}")
        legend_below(axes[-1])
    return figure


def frontier(plot, runs: list[dict]):
    """Draw Pass@1 against the largest Pass@k: a point per selection at its best λ (Table 1)."""
    files, metrics = files_and_metrics(runs)
    figure, columns = panels(plot, runs)
    for (axis,), rows in columns:
        best = best_strengths(rows)
        for marker, (row, by_seed) in zip(MARKERS, best.items()):
            x, across = over_seeds(by_seed, ("trained", files[0], "pass@1"))
            y, up = over_seeds(by_seed, ("trained", files[0], metrics[-1]))
            axis.errorbar(x, y, up, across, fmt=marker, elinewidth=0.8, **style_of(row, best))
        axis.set(xlabel=f"Pass@1, {files[0]}", ylabel=f"{metrics[-1].title()}, {files[0]}")
        legend_below(axis)
    return figure


def pass_at_k(plot, runs: list[dict]):
    """Draw Pass@k, and below it the last row minus the one before it (Figures 3 and 4)."""
    files, metrics = files_and_metrics(runs)
    ks = [int(metric.removeprefix("pass@")) for metric in metrics]
    paths = [("trained", files[0], metric) for metric in metrics]
    figure, columns = panels(plot, runs, 2)
    for (above, below), rows in columns:
        for row, by_seed in rows.items():
            points = [over_seeds(by_seed, path) for path in paths]
            draw_band(above, ks, points, style_of(row, rows))
        *_, first, second = rows
        gaps = [t_test(differences(rows[second], rows[first], path))[:2] for path in paths]
        draw_band(below, ks, gaps, style_of(second, rows))
        below.set_title(f"{row_label(second)} − {row_label(first)}, seed by seed")
        below.axhline(0, color="black")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, ks)
            axis.set(xlabel="k", ylabel=f"Pass@k, {files[0]}")
        above.legend()
    return figure


# ---------------------------------------------------------------- training curves

CURVES = {
    "accuracy of the step's completions": "reward/accuracy",
    "entropy (nats)": "entropy",
    "KL on selected tokens (nats)": "kl/selected",
    "completion length (tokens)": "length/mean",
    "held-out Pass@1": "eval/pass@1",
    "held-out Pass@16": "eval/pass@16",
}


def training_curves(plot, folders: list[str]):
    """Draw six metrics of several runs over their steps."""
    figure, axes = plot.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for i, folder in enumerate(folders):
        rows = read_jsonl(Path(folder) / "metrics.jsonl")
        for axis, (title, key) in zip(axes.flat, CURVES.items()):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), ".-", color=f"C{i}", label=folder)
            axis.set(xlabel="step", title=title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def main(folders: list[str]) -> None:
    require(bool(folders), "give folders of runs: python -m paper.figures runs/a runs/b")
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        require(file.is_file(), f"{folder}: there is no metrics.jsonl; give folders of runs")
    print(picture(Path("training_curves.png"), training_curves, folders))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
