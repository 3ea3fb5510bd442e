"""What all pictures share; Pass@k of several models, training curves of several runs."""

from pathlib import Path

from support.config import read_stored, require
from support.files import read_log
from support.report import mean_interval

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

CURVES = {  # title: the keys of metrics.jsonl that hold it, the first found is drawn
    "accuracy of the step's completions": ("reward/accuracy",),
    "entropy (nats)": ("entropy",),
    "KL on selected tokens (nats)": ("kl/selected",),
    "completion length (tokens)": ("length/mean",),
    "held-out Pass@1": ("eval/pass@1",),
    "held-out Pass@16": ("eval/pass@16", "eval/pass@4"),
}
OF_SEEDS = {"seed", "name", "resume"}  # by these the runs of one line may differ


def read_metrics(folders: list[str]) -> dict[str, list[dict]]:
    """The rows of each run's metrics.jsonl."""
    runs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        require(file.is_file(), f"plot={folder}: no metrics.jsonl there; give folders of runs, runs/a,runs/b")
        # A value that was not finite, None, is left out.
        runs[folder] = [{key: x for key, x in row.items() if x is not None} for row in read_log(file)]
    return runs


def curves_of(folders: list[str], out: str) -> str:
    """Draws the training curves of runs; returns the line to print."""
    path, runs = Path("training_curves.png" if out == "auto" else out), read_metrics(folders)
    require(path.suffix in (".png", ".pdf", ".svg") and path.parent.is_dir() and not path.is_dir(),
            f"out={out}: give the name of a picture, .png, .pdf or .svg, in a folder that there is")
    return picture(path, lambda plot: training_curves(plot, runs))


def by_seed(folders: list[str]) -> dict[str, list[str]]:
    """{label: runs that differ in nothing but their seed}; a run without config.yaml stands alone.

    Several seeds are called by what tells them from the other lines, one run by its folder.
    """
    groups: dict[tuple, list[str]] = {}
    for folder in folders:
        file = Path(folder) / "config.yaml"
        keys = read_stored(file) if file.is_file() else {"run": folder}
        same = tuple(sorted((key, str(value)) for key, value in keys.items() if key not in OF_SEEDS))
        groups.setdefault(same, []).append(folder)
    shared = set.intersection(*map(set, groups))
    labels = {}
    for keys, own in groups.items():
        words = ", ".join(f"{key}={value}" for key, value in keys if (key, value) not in shared) or own[0]
        labels[own[0] if len(own) == 1 else f"{words}: {len(own)} seeds"] = own
    return labels


def training_curves(plot, runs: dict[str, list[dict]]):
    """Six panels over the steps of several runs; several seeds of one are a mean with its 95 % interval."""
    groups = by_seed(list(runs))
    own = dict(zip(groups, colours([method_of(folders[0]) for folders in groups.values()])))
    figure, axes = plot.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, CURVES.items()):
        for label, folders in groups.items():
            every = [row for folder in folders for row in runs[folder]]
            key = next((key for key in keys if any(key in row for row in every)), keys[0])
            if key == "kl/selected" and not any(row.get(key) for row in every):
                continue  # no token was selected
            draw_curve(axis, key, [[row for row in runs[folder] if key in row] for folder in folders], own[label])
        axis.set(xlabel="step", title=title)
        axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))  # none of these is negative, whatever a band may say
    legend(figure, [plot.Line2D([], [], color=own[label]) for label in groups], list(groups))
    words = "Thin: every step; thick: the mean of 11 around it. Bars on held-out points: 95 % intervals over problems"
    if len(groups) < len(runs):
        words += ".\nOf several seeds: the mean, with bands and bars that are 95 % intervals over seeds (Student)"
    caption(figure, words)
    return figure


def draw_curve(axis, key: str, runs: list[list[dict]], colour: str) -> None:
    """One quantity of one run, or of several seeds at the steps that all of them have."""
    runs = [{row["step"]: row for row in rows} for rows in runs]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    if not steps:
        return
    values = [[run[step][key] for step in steps] for run in runs]
    if key.startswith("eval/"):
        middle, half = over_seeds(values)
        if len(runs) == 1:
            half = [1.96 * runs[0][step].get(f"{key}_stderr", 0.0) for step in steps]
        axis.errorbar(steps, middle, half, fmt="o-", color=colour, markersize=4, capsize=3, elinewidth=1)
        return
    reach = 5 if len(steps) > 20 else 0
    middle, half = over_seeds([running_mean(row, reach) for row in values])
    inner = steps[reach : len(steps) - reach]
    axis.plot(inner, middle, color=colour)
    if len(runs) == 1:
        axis.plot(steps, values[0], color=colour, alpha=0.3, linewidth=1)
    else:
        low, high = ([m + sign * h for m, h in zip(middle, half)] for sign in (-1, 1))
        axis.fill_between(inner, low, high, color=colour, alpha=0.2, linewidth=0)


def over_seeds(runs: list[list[float]]) -> tuple[tuple, tuple]:
    """At each step the mean over runs, and half its 95 % interval."""
    return tuple(zip(*(mean_interval(column) for column in zip(*runs))))


def running_mean(values, reach: int) -> list[float]:
    """The mean of each value and its `reach` neighbours on either side, where it has so many: nothing is made up for
    before the first or after the last, and a fall is drawn neither late nor early.  [n] -> [n - 2 reach]
    """
    return [sum(values[i - reach : i + reach + 1]) / (2 * reach + 1) for i in range(reach, len(values) - reach)]
