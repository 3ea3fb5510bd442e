"""Tables in text, and two pictures: Pass@k of several models, training curves of several runs."""

import json
from pathlib import Path

from support.config import UserError


def aligned(lines: list[list[str]]) -> str:
    """A table of texts, the first line its head, with columns aligned on the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def format_table(summaries: dict[str, dict]) -> str:
    """An aligned table, one line a model: value, and its standard error where it has one."""
    columns = list(dict.fromkeys(name for metrics in summaries.values() for name in metrics))

    def cell(metric):
        if metric is None:
            return "-"
        value, error = metric
        return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"

    return aligned([["", *columns]] + [[label, *(cell(metrics.get(name)) for name in columns)]
                                       for label, metrics in summaries.items()])


def difference_table(rows: list[str], differences: dict[str, dict[str, tuple]]) -> str:
    """A line a metric, a column a model."""

    def cell(found: tuple | None) -> str:
        if found is None:
            return "-"
        value, low, high = found
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] {'*' if low > 0 or high < 0 else ' '}"

    lines = [[row, *(cell(own.get(row)) for own in differences.values())] for row in rows]
    return aligned([["", *differences], *lines])


def picture(path: Path, draw) -> str:
    """Saves the figure that `draw(pyplot)` makes; returns the line to print, without matplotlib how to get it."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"written: {path}"


def pass_at_k(plot, report: dict):
    """Pass@k over log2 k with bands of 1.96 standard errors, a line a model, a panel a problem file (paper's Figure 3).

    report: {file: {model: {metric: (value, standard error)}}}.
    """
    figure, axes = plot.subplots(1, len(report), figsize=(5.2 * len(report), 4), squeeze=False, layout="constrained")
    for axis, (file, models) in zip(axes[0], report.items()):
        for model, metrics in models.items():
            ks = [int(name[5:]) for name in metrics if name.startswith("pass@")]
            values = [metrics[f"pass@{k}"][0] for k in ks]
            errors = [1.96 * (metrics[f"pass@{k}"][1] or 0) for k in ks]
            (line,) = axis.plot(ks, values, marker="o", markersize=3, label=short_name(model))
            low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
            axis.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="k", ylabel="Pass@k", title="held-out Countdown" if file == "auto" else file)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def short_name(model: str) -> str:
    """A run's name for the model in its folder."""
    parts = Path(model).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else model


CURVES = {  # title: the keys of metrics.jsonl that hold it, the first found is drawn
    "accuracy of the step's completions": ("reward/accuracy",),
    "entropy (nats)": ("entropy",),
    "KL to the initial model, selected tokens (nats)": ("kl/selected",),
    "completion length (tokens)": ("length/mean",),
    "held-out Pass@1": ("eval/pass@1",),
    "held-out Pass@16": ("eval/pass@16", "eval/pass@4"),
}


def read_metrics(folders: list[str]) -> dict[str, list[dict]]:
    """The rows of each run's metrics.jsonl."""
    runs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"plot={folder}: no metrics.jsonl there; give folders of runs, runs/a,runs/b")
        runs[folder] = [json.loads(line) for line in file.read_text().splitlines()]
    return runs


def training_curves(plot, runs: dict[str, list[dict]]):
    """Six panels over the steps of several runs."""
    figure, axes = plot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, CURVES.items()):
        for i, rows in enumerate(runs.values()):
            key = next((key for key in keys if any(key in row for row in rows)), keys[0])
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points or (key == "kl/selected" and not any(value for _, value in points)):
                continue  # no token was selected
            steps, values = zip(*points)
            if key.startswith("eval/"):
                axis.plot(steps, values, "o-", color=f"C{i}", markersize=4)
            else:  # noisy: a running mean on top
                axis.plot(steps, values, color=f"C{i}", alpha=0.25)
                axis.plot(steps, running_mean(values), color=f"C{i}")
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    handles = [plot.Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def running_mean(values, reach: int = 5) -> list[float]:
    """The mean of each value and its neighbours within `reach`: centred, so that a fall is not drawn late."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
