"""Draw the pictures of `paper.reproduce`.

`runs` are lines of runs.jsonl, as in paper.tables. matplotlib is imported only when something is
drawn; `plot` is matplotlib.pyplot.
"""

import re
from pathlib import Path

import numpy as np

from paper.tables import (
    choose,
    interval,
    mean_metric,
    metric_values,
    pass_values,
    reported,
    settings_of,
    test_files,
    validation_metrics,
)

STYLE = {
    "savefig.dpi": 160,
    "legend.fontsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
COLORS = {
    "base model": "darkgray",
    "GRPO": "black",
    "SCOPE": "royalblue",
    "Uniform": "orange",
    "Forking": "green",
    "KL-Cov": "crimson",
    "entropy change": "purple",
    "all tokens": "saddlebrown",
    "Non-Forking": "hotpink",
}


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


def color_of(method: str, methods) -> str:
    """Return the color of a method among others."""
    return COLORS.get(method) or f"C{list(methods).index(method)}"


def legend_below(figure, axis) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=8)


# ---------------------------------------------------------------- pictures of a study


def settings_picture(plot, runs: list[dict]):
    """Draw every setting on the validation problems: Pass@1 against Pass@k, both over d_collapse.

    The choice of each method is a large point.
    """
    settings = settings_of(runs)
    one, largest, _, collapse = validation_metrics(settings)
    pairs = ((one, largest), (collapse, one), (collapse, largest))
    figure, axes = plot.subplots(1, len(pairs), figsize=(13, 4.6), layout="constrained")
    choices = choose(runs)
    for setting, rows in settings.items():
        style = {"color": color_of(setting[0], choices), "s": 14, "alpha": 0.35, "linewidths": 0}
        if setting in choices.values():
            style |= {"s": 90, "alpha": 1.0, "label": setting[0], "edgecolors": "black"}
            style |= {"linewidths": 1.0, "zorder": 3}
        for axis, (x, y) in zip(axes, pairs):
            axis.scatter(mean_metric(rows, x), mean_metric(rows, y), **style)
            axis.set(xlabel=x.replace("pass", "Pass"), ylabel=y.replace("pass", "Pass"))
    legend_below(figure, axes[0])
    return figure


def draw_band(axis, x: list, values: list[np.ndarray], color: str, label: str) -> None:
    """Draw a line through the means of values [S, P], and the band of their intervals."""
    means, lows, highs = np.array([interval(value) for value in values]).T
    axis.plot(x, means, marker=".", color=color, label=label)
    axis.fill_between(x, lows, highs, color=color, alpha=0.15, linewidth=0)


def pass_at_k(plot, runs: list[dict]):
    """Draw Pass@k of GRPO and SCOPE on every test file, and below their difference (Figure 3)."""
    methods = reported(runs)
    grpo, scope = methods["GRPO"], methods["SCOPE"]
    files = test_files(runs)
    figure, axes = plot.subplots(
        2, len(files), figsize=(1 + 3.2 * len(files), 6), squeeze=False, layout="constrained"
    )
    rows = {"base model": ("base", grpo), "GRPO": ("trained", grpo), "SCOPE": ("trained", scope)}
    for (above, below), file in zip(axes.T, files):
        ks = [2**i for i in range(7) if 2**i <= max(files[file])]
        for label, (model, of_method) in rows.items():
            values = [pass_values(of_method, file, model, k) for k in ks]
            draw_band(above, ks, values, COLORS[label], label)
        gaps = []
        for k in ks:
            of_scope = pass_values(scope, file, "trained", k)
            gaps.append(of_scope - pass_values(grpo, file, "trained", k))
        draw_band(below, ks, gaps, COLORS["SCOPE"], "SCOPE")
        below.axhline(0, color="black", linewidth=1)
        above.set(title=file, ylabel="Pass@k")
        below.set(ylabel="SCOPE − GRPO", xlabel="k")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, ks)
    legend_below(figure, axes[0, 0])
    return figure


def shares_of(methods: dict) -> dict[str, dict[float, list[dict]]]:
    """Return {label of λ: {q in per cent: runs}} of the methods called "λ = 0.1, q = 5 %"."""
    shares: dict[str, dict] = {}
    for method, of_method in methods.items():
        name = re.fullmatch("(λ = .*), q = (.*) %", method)
        if name:
            shares.setdefault(name[1], {})[float(name[2])] = of_method
    return shares


def shares_picture(plot, runs: list[dict]):
    """Draw Pass@k and d_collapse, minus GRPO's, over the share q of tokens that pay (Figure 1)."""
    methods = reported(runs)
    lines = shares_of(methods)
    shares = list(next(iter(lines.values())))
    file, ks = next(iter(test_files(runs).items()))
    figure, axes = plot.subplots(1, 3, figsize=(11, 4), layout="constrained")

    def values(of_method: list[dict], title: str) -> np.ndarray:
        if title == "d_collapse":
            return metric_values(of_method, file, "trained", title)
        return pass_values(of_method, file, "trained", int(title.removeprefix("Pass@")))

    for axis, title in zip(axes, ("Pass@1", f"Pass@{ks[-1]}", "d_collapse")):
        grpo = values(methods["GRPO"], title)
        for i, (label, by_share) in enumerate(lines.items()):
            gaps = [values(by_share[share], title) - grpo for share in shares]
            draw_band(axis, shares, gaps, f"C{i}", label)
        axis.axhline(0, color=COLORS["GRPO"], linewidth=1, label="GRPO")
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.set(title=f"{title}, difference to GRPO", xlabel="tokens that pay (%)")
    legend_below(figure, axes[0])
    return figure


# the study of each size of the toy's hidden states, by its label
SIZES = {"hidden size 64": "small", "96, the default": "boundary", "192": "large"}


def sizes_picture(plot, sizes: dict[str, list[dict]]):
    """Draw SCOPE minus the base model and minus GRPO, for {label: runs} (Figure 4)."""
    figure, axes = plot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    ks = [1, 2, 4, 8, 16, 32, 64]
    for i, (label, runs) in enumerate(sizes.items()):
        methods = reported(runs)
        others = {"the base model": ("base", "SCOPE"), "GRPO": ("trained", "GRPO")}
        for axis, (title, (model, other)) in zip(axes, others.items()):
            gaps = []
            for k in ks:
                of_scope = pass_values(methods["SCOPE"], "4-numbers", "trained", k)
                gaps.append(of_scope - pass_values(methods[other], "4-numbers", model, k))
            draw_band(axis, ks, gaps, f"C{i}", label)
            axis.axhline(0, color="black", linewidth=1)
            axis.set(title=f"SCOPE − {title}", ylabel="difference in Pass@k", xlabel="k")
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, ks)
    legend_below(figure, axes[0])
    return figure


def pictures_of(runs: list[dict]) -> dict:
    """Return {file name: function that draws it} of a study."""
    drawings = {}
    if any(run["stage"] == "tuning" for run in runs):
        drawings["settings.png"] = settings_picture
    methods = reported(runs)
    if shares_of(methods) and len({len(of_method) for of_method in methods.values()}) == 1:
        drawings["shares.png"] = shares_picture
    if has_pair(runs):
        drawings["pass_at_k.png"] = pass_at_k
    return drawings


def has_pair(runs: list[dict]) -> bool:
    """Return whether GRPO and SCOPE have the same number of seeds, as in a study that is done."""
    methods = reported(runs)
    return len(methods.get("GRPO", [])) == len(methods.get("SCOPE", [])) > 0
