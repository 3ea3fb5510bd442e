"""What all pictures share; Pass@k of several models, training curves of several runs."""

import sys
from pathlib import Path

from support.config import one_line_errors, read_stored, require
from support.files import read_log

# Of 9 inches, with letters that can still be read where a page shows it 850 pixels wide.
STYLE = {"savefig.dpi": 180, "font.size": 10, "axes.titlesize": 10.5, "legend.fontsize": 9, "axes.grid": True,
         "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
GREY = "0.35"

# A method has one colour in every picture, by its name in tables and in config.yaml. Those that meet in one picture
# are told apart by the colour-blind too (a test measures it).
COLOURS = {name: colour for colour, names in {
    "#000000": ("base model",),
    "#0072B2": ("GRPO", "grpo"),
    "#D55E00": ("SCOPE", "scope", "selected", "mean over the selected"),
    "#009E73": ("Uniform", "uniform", "Tok-Entropy", "token_entropy"),
    "#56B4E9": ("INTUITOR", "Self-Certainty", "self_certainty"),
    "#CC79A7": ("Positive-Adv.", "positive", "Div", "div", "positive, unselected"),
    "#E69F00": ("Forking", "forking", "Forking RL", "forking_rl"),
    "#661100": ("Fork + Adv.", "forking_positive", "Traj-Entropy", "trajectory_likelihood", "forking in play"),
    "#999933": ("Non-Forking", "non_forking", "EM-RL token", "trajectory_entropy"),
    "#332288": ("KL-Cov", "covariance", "kl_cov", "constant for a token"),
    "#117733": ("entropy change", "entropy_change", "Clip-Cov", "clip_cov"),
    "#DDCC77": ("all tokens", "all"),
    "#404040": ("SCOPE + residual", "residual"),
}.items() for name in names}


def colours(names: list[str]) -> list[str]:
    """A colour for each name: its own; one that has none, or whose own is taken, gets the next that is free."""
    found: list[str] = []
    taken = {COLOURS.get(name) for name in names}
    free = [colour for colour in dict.fromkeys(COLOURS.values()) if colour not in taken] * (1 + len(names))
    for name in names:
        own = COLOURS.get(name)
        found.append(own if own and own not in found else free.pop(0) if free else GREY)
    return found


def method_of(model: str) -> str:
    """What trained the model of a run's folder, or the run itself, as COLOURS has it: of all methods the last named."""
    folder = Path(model).parent if Path(model).name == "model" else Path(model)
    if not (folder / "config.yaml").is_file():
        return "base model"
    keys = read_stored(folder / "config.yaml")
    words = [str(keys.get(key)) for key in ("objective", "reward.kind", "selection.strategy")]
    return [word for word in ["grpo", *words] if word in COLOURS][-1]


def picture(path: Path, draw) -> str:
    """Saves the figure that `draw(pyplot)` makes; returns the line to print, without matplotlib how to get it."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure = draw(pyplot)
        figure.savefig(path)
        pyplot.close(figure)
    return f"written: {path}"


def caption(figure, text: str) -> None:
    """Below everything: what the bands and marks mean."""
    figure.supxlabel(text, fontsize=9, color=GREY)


def legend(figure, handles, labels) -> None:
    """Above everything, in as many columns as there is room for."""
    room, widths = 12 * figure.get_figwidth(), [len(label) + 5 for label in labels]  # in letters
    columns = len(labels) if sum(widths) < room else max(1, int(room / max(widths)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def curve(axis, x, middle, low, high, **style) -> None:
    """A line with points, and its band."""
    (line,) = axis.plot(x, middle, marker="o", markersize=4, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def over_k(axis) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")


def pass_at_k(plot, report: dict, sizes: dict[str, str]):
    """Pass@k over log2 k, a line a model, a panel a problem file (paper's Figure 3), and below what the others are
    above the first model.

    report: {file: {model: {metric: (value, standard error), "differences": {metric: (value, low, high)}}}}; sizes:
    {file: how many problems and samples}; the average over files has none.
    """
    names = list(next(iter(report.values())))
    own = dict(zip(names, colours([method_of(name) for name in names])))
    several = len(names) > 1
    figure, axes = plot.subplots(1 + several, len(report), figsize=(max(6.5, 4.5 * len(report)), 3.6 + 2.6 * several),
                                 squeeze=False, layout="constrained", sharex=True)
    for column, (file, found) in enumerate(report.items()):
        above = axes[0, column]
        for name, metrics in found.items():
            ks = [int(metric[5:]) for metric in metrics if metric.startswith("pass@")]
            points = [metrics[f"pass@{k}"] for k in ks]
            low, high = ([value + sign * 1.96 * (error or 0) for value, error in points] for sign in (-1, 1))
            curve(above, ks, [value for value, _ in points], low, high, color=own[name], label=short_name(name))
            if gaps := metrics.get("differences"):
                curve(axes[1, column], ks, *zip(*[gaps[f"pass@{k}"] for k in ks]), color=own[name])
        over_k(above)
        title = "held-out Countdown" if file == "auto" else Path(file).name
        above.set(title=f"{title}\n{sizes.get(file, '')}", ylabel="Pass@k")
        if several:
            axes[1, column].axhline(0, color=own[names[0]], linewidth=1)
            axes[1, column].set_ylabel("difference in Pass@k")
        axes[-1, column].set_xlabel("k")
    legend(figure, *axes[0, 0].get_legend_handles_labels())
    caption(figure, "Bands: 95 % intervals over problems, 1.96 standard errors"
            + f"\nBelow: difference from {short_name(names[0])} on the same problems, paired bootstrap" * several)
    return figure


def short_name(model: str) -> str:
    """A run's name for the model in its folder."""
    parts = Path(model).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else model


# ---------------------------------------------------------------- training curves

CURVES = {  # title: the key of metrics.jsonl
    "accuracy of the step's completions": "reward/accuracy",
    "entropy (nats)": "entropy",
    "KL on selected tokens (nats)": "kl/selected",
    "completion length (tokens)": "length/mean",
    "held-out Pass@1": "eval/pass@1",
    "held-out Pass@16": "eval/pass@16",
}


def read_runs(folders: list[str]) -> dict[str, list[dict]]:
    """Read the rows of each run's metrics.jsonl; values that were not finite (None) are left out."""
    runs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        require(file.is_file(), f"{folder}: no metrics.jsonl there; give folders of runs, runs/a runs/b")
        runs[folder] = [{key: x for key, x in row.items() if x is not None} for row in read_log(file)]
    return runs


def training_curves(plot, runs: dict[str, list[dict]]):
    """Draw six quantities of several runs over their steps, a line a run."""
    figure, axes = plot.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    run_colours = dict(zip(runs, colours([method_of(folder) for folder in runs])))
    for axis, (title, key) in zip(axes.flat, CURVES.items()):
        for folder, rows in runs.items():
            rows = [row for row in rows if key in row]
            if not rows:
                continue
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            errors = [1.96 * row.get(f"{key}_stderr", 0.0) for row in rows]
            if key.startswith("eval/"):
                axis.errorbar(steps, values, errors, fmt="o-", color=run_colours[folder], markersize=4, capsize=3)
            else:
                axis.plot(steps, values, color=run_colours[folder], linewidth=1)
        axis.set(xlabel="step", title=title)
        axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))  # none of these is negative
    legend(figure, [plot.Line2D([], [], color=colour) for colour in run_colours.values()], list(runs))
    caption(figure, "Bars on held-out points: 95 % intervals over problems")
    return figure


if __name__ == "__main__":  # python -m support.plots runs/a runs/b
    with one_line_errors():
        RUNS = read_runs(sys.argv[1:])
        print(picture(Path("training_curves.png"), lambda plot: training_curves(plot, RUNS)))
