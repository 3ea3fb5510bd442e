"""The two pictures: Pass@k of several models, training curves of several runs. Without matplotlib, how to get them."""

import json
from pathlib import Path

from config import UserError

HOW = "no picture: pip install matplotlib"


def pass_at_k_figure(report: dict, path: Path) -> str:
    """Pass@k over log2 k with bands of 1.96 standard errors, a line a model, a panel a problem file (paper's Figure 3).

    report: {file: {model: {figure: (value, standard error)}}}. Returns the line to print.
    """
    try:
        import matplotlib
    except ImportError:
        return HOW
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(report), figsize=(5.2 * len(report), 4), squeeze=False, layout="constrained")
    for axis, (file, models) in zip(axes[0], report.items()):
        for model, figures in models.items():
            ks = [int(name[5:]) for name in figures if name.startswith("pass@")]
            values = [figures[f"pass@{k}"][0] for k in ks]
            errors = [1.96 * (figures[f"pass@{k}"][1] or 0) for k in ks]
            (line,) = axis.plot(ks, values, marker="o", markersize=3, label=model)
            low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
            axis.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="k", ylabel="Pass@k", title=file)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    return f"written: {path}"


CURVES = {  # title: the keys of metrics.jsonl that hold it, the first found is drawn
    "accuracy of the step's completions": ("reward/accuracy",),
    "entropy (nats)": ("entropy",),
    "KL to the initial model, selected tokens (nats)": ("kl/selected",),
    "completion length (tokens)": ("length/mean",),
    "held-out Pass@1": ("eval/pass@1",),
    "held-out Pass@16": ("eval/pass@16", "eval/pass@4"),
}


def training_curves(folders: list[str]) -> Path:
    """training_curves.png: six panels over the steps of several runs, from their metrics.jsonl."""
    runs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"plot={folder}: no metrics.jsonl there; give folders of runs, runs/a,runs/b")
        runs[folder] = [json.loads(line) for line in file.read_text().splitlines()]
    try:
        import matplotlib
    except ImportError:
        raise UserError(HOW) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, CURVES.items()):
        for name, rows in runs.items():
            key = next((key for key in keys if any(key in row for row in rows)), keys[0])
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points:
                continue
            marker = "o" if key.startswith("eval/") else None
            color = f"C{list(runs).index(name)}"
            steps, values = zip(*points)
            axis.plot(steps, values, color=color, marker=marker, markersize=4, alpha=1 if marker else 0.25)
            if marker is None:  # noisy: a running mean on top
                axis.plot(steps, running_mean(values), color=color)
            axis.plot([], [], color=color, label=name)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    path = Path("training_curves.png")
    figure.savefig(path, dpi=130)
    return path


def running_mean(values, weight: float = 0.9) -> list[float]:
    """Exponential mean, each value corrected for the start: no pull towards 0 at the beginning."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result
