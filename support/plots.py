"""Two pictures: Pass@k of several models, training curves of several runs."""

import json
from pathlib import Path

from support import report
from support.config import UserError
from support.statistics import mean_interval


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


# ---------------------------------------------------------------- over seeds: the lines of reproduce.py


def panels(plot, lines: list[dict], width: float = 6.0):
    """A panel a section: the figure, and (axis, section, its rows) of each."""
    sections = list(dict.fromkeys(line["section"] for line in lines))
    figure, axes = plot.subplots(1, len(sections), figsize=(width * len(sections), 4.2), squeeze=False,
                                 layout="constrained")
    return figure, [(axis, section, report.by_row(lines, section)) for axis, section in zip(axes[0], sections)]


def trained(metric: str, file: str) -> tuple[str, ...]:
    return "trained", file, metric


def benchmarks(lines: list[dict]) -> tuple[list[str], str]:
    """The problem files, and the Pass@k of largest k."""
    found = lines[0]["figures"]["trained"]
    files = [file for file in found if file != "validation"]
    return files, [metric for metric in found[files[0]] if metric.startswith("pass@")][-1]


def bars(plot, lines: list[dict]):
    """Pass@1 on each benchmark: a bar a row, its mean over seeds, and a dot a seed (paper's Figure 2)."""
    files, _ = benchmarks(lines)
    figure, found = panels(plot, lines)
    for axis, section, rows in found:
        for i, (row, runs) in enumerate(rows.items()):
            for j, file in enumerate(files):
                values = [report.value(line, trained("pass@1", file)) for line in runs.values()]
                x = j + (i + 0.5) / len(rows) * 0.8 - 0.4
                axis.bar(x, sum(values) / len(values), 0.75 / len(rows), color=f"C{i}", alpha=0.55,
                         label=report.name_of(row) if j == 0 else None)
                axis.plot([x] * len(values), values, "k.", markersize=3)
        for j, file in enumerate(files):
            axis.hlines(lines[0]["figures"]["base"][file]["pass@1"], j - 0.45, j + 0.45, colors="k", linestyles=":",
                        label="base model" if j == 0 else None)
        axis.set_xticks(range(len(files)), files)
        axis.set(title=section, ylabel="Pass@1")
        axis.legend(fontsize=7)
    return figure


def over_strength(plot, lines: list[dict]):
    """Pass@1 on the first benchmark over q, a line a form, with 95 % intervals over seeds (paper's Figure 1).

    q is what was selected, the mean over the end of the runs: less than was asked for where too few tokens score.
    """
    files, _ = benchmarks(lines)
    figure, found = panels(plot, lines)
    for axis, section, rows in found:
        zero = {row: runs for row, runs in rows.items() if row[1] is None}
        for form in dict.fromkeys(label for label, strength in rows if strength is not None):
            points = [*zero.values(), *(runs for (label, _), runs in rows.items() if label == form)]
            shares = [mean_interval([100 * report.value(line, ("training", "selection/fraction"))
                                     for line in runs.values()])[0] for runs in points]
            values = [mean_interval([report.value(line, trained("pass@1", files[0])) for line in runs.values()])
                      for runs in points]
            axis.errorbar(shares, [mean for mean, _ in values], [half for _, half in values], marker="o",
                          markersize=4, capsize=2, label=form)
            axis.legend(fontsize=8)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
        axis.set(title=section, xlabel="q, % of tokens that pay", ylabel=f"Pass@1, {files[0]}")
        axis.grid(alpha=0.3)
    return figure


def frontier(plot, lines: list[dict]):
    """Pass@1 against Pass@k of the largest k on the first benchmark: a line a row through its strengths."""
    files, largest = benchmarks(lines)
    figure, found = panels(plot, lines, width=7.0)
    for axis, section, rows in found:
        for i, label in enumerate(dict.fromkeys(label for label, _ in rows)):
            points = sorted((strength or 0.0, *(sum(report.value(line, trained(metric, files[0]))
                                                    for line in runs.values()) / len(runs)
                                                for metric in ("pass@1", largest)))
                            for (name, strength), runs in rows.items() if name == label)
            axis.plot([x for _, x, _ in points], [y for *_, y in points], marker="*" if len(points) == 1 else "o",
                      color=f"C{i % 10}", linestyle="-" if i < 10 else "--", markersize=5, label=label)
            for strength, x, y in points:
                if strength:
                    axis.annotate(f"{strength:g}", (x, y), fontsize=5, xytext=(2, 2), textcoords="offset points")
        axis.set(title=section, xlabel=f"Pass@1, {files[0]}",
                 ylabel=f"{largest.capitalize()}, {files[0]}")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure


def pass_at_k_over_seeds(plot, lines: list[dict]):
    """Pass@k of base and rows on the first benchmark, with 95 % intervals over seeds, and below the difference of the
    second row from the first (paper's Figures 3 and 4)."""
    files, _ = benchmarks(lines)
    base = lines[0]["figures"]["base"][files[0]]
    ks = [int(metric[5:]) for metric in base if metric.startswith("pass@")]
    sections = list(dict.fromkeys(line["section"] for line in lines))
    figure, axes = plot.subplots(2, len(sections), figsize=(5.5 * len(sections), 7), squeeze=False,
                                 layout="constrained", sharex=True)
    for column, section in enumerate(sections):
        rows = report.by_row(lines, section)
        axes[0, column].plot(ks, [base[f"pass@{k}"] for k in ks], "k-.", label="base model")
        curves = {row: {k: {seed: report.value(line, trained(f"pass@{k}", files[0])) for seed, line in runs.items()}
                        for k in ks} for row, runs in rows.items()}
        gaps = {}
        if len(curves) > 1:
            (first, one), (second, other) = list(curves.items())[:2]
            if both := one[1].keys() & other[1].keys():
                gap = {k: {seed: other[k][seed] - one[k][seed] for seed in both} for k in ks}
                gaps[f"{second[0]} − {first[0]}", None] = gap
        for axis, found in ((axes[0, column], curves), (axes[1, column], gaps)):
            for row, curve in found.items():
                points = [mean_interval(list(curve[k].values())) for k in ks]
                (line,) = axis.plot(ks, [mean for mean, _ in points], "o-", markersize=3, label=report.name_of(row))
                axis.fill_between(ks, [m - h for m, h in points], [m + h for m, h in points],
                                  color=line.get_color(), alpha=0.2, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.grid(alpha=0.3)
            if found:
                axis.legend(fontsize=8)
        axes[0, column].set(title=f"{section}, {files[0]}", ylabel="Pass@k")
        axes[1, column].axhline(0, color="k", linewidth=0.8)
        axes[1, column].set(xlabel="k", ylabel="difference in Pass@k")
    return figure
