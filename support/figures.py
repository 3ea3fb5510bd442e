"""The pictures of reproduce.py, over seeds: `lines` are its runs, as in support/report.py; sections are panels."""

from collections import Counter

from support import report
from support.plots import COLOURS, GREY, caption, colours, curve, legend, over_k
from support.report import mean_interval

TITLES = {"RLVR": "RLVR, with a verifier", "RLIF": "RLIF, without a verifier"}


def panels(plot, lines: list[dict], rows: int = 1, stacked: bool = False, height: float = 4.0, **more):
    """A panel a section, side by side or stacked, or a column of `rows` panels: the figure, and (panels, its rows)."""
    sections = list(dict.fromkeys(line["section"] for line in lines))
    shape = (len(sections), 1) if stacked else (rows, len(sections))
    figure, axes = plot.subplots(*shape, figsize=(9 if len(sections) > 1 else 6.5, height * shape[0]), squeeze=False,
                                 layout="constrained", **more)
    found = axes if stacked else axes.T
    for own, section in zip(found, sections):
        own[0].set_title(TITLES.get(section, section))
    return figure, [(own, report.by_row(lines, section)) for own, section in zip(found, sections)]


def trained(metric: str, file: str) -> tuple[str, ...]:
    return "trained", file, metric


def benchmarks(lines: list[dict]) -> tuple[list[str], str]:
    """The problem files, and the Pass@k of largest k."""
    found = lines[0]["figures"]["trained"]
    files = [file for file in found if file != "validation"]
    return files, [metric for metric in found[files[0]] if metric.startswith("pass@")][-1]


def data_of(lines: list[dict], file: str = "") -> str:
    """What the problems are called on an axis."""
    config = lines[0]["config"]
    words = "held-out Countdown" if config.get("data", config.get("data.file")) == "countdown" else "held-out problems"
    return f"{words}, {file}" if file else words


def intervals(lines: list[dict]) -> str:
    counts = Counter((line["section"], line["row"], line["strength"]) for line in lines).values()
    fewest, most = min(counts), max(counts)
    return f"95 % interval over {fewest if fewest == most else f'{fewest} to {most}'} seeds (Student)"


def over_seeds(runs: dict[int, dict], metric: str, file: str) -> tuple[list[float], float, float]:
    """The values, a seed each, their mean and half its interval."""
    values = [report.value(line, trained(metric, file)) for line in runs.values()]
    return values, *mean_interval(values)


def bars(plot, lines: list[dict]):
    """Pass@1 on each benchmark: a bar a row, its mean over seeds, and a dot a seed (paper's Figure 2).

    Where a row has a twin "+ SCOPE" both have its colour, pale without and full with.
    """
    files, _ = benchmarks(lines)
    labels = {line["row"] for line in lines}
    figure, found = panels(plot, lines, stacked=len(labels) > 4, height=3.4, sharey=True)
    for (axis,), rows in found:
        own = {name: colour for names in [list(dict.fromkeys(label.removesuffix(" + SCOPE") for label, _ in rows))]
               for name, colour in zip(names, colours(names))}
        width = 0.8 / len(rows)
        for i, (row, runs) in enumerate(rows.items()):
            colour = own[row[0].removesuffix(" + SCOPE")]
            pale = f"{row[0]} + SCOPE" in labels
            for j, file in enumerate(files):
                values, mean, half = over_seeds(runs, "pass@1", file)
                x = j + (i + 0.5) * width - 0.4
                axis.bar(x, mean, 0.92 * width, color=(colour, 0.15 if pale else 0.8), edgecolor=colour,
                         label=report.name_of(row) if j == 0 else None)
                axis.errorbar(x, mean, half, color="k", elinewidth=1.2, capsize=2)
                beside = [x + width * 0.6 * ((seed + 0.5) / len(values) - 0.5) for seed in range(len(values))]
                axis.plot(beside, values, ".", color=GREY, markersize=3)
        for j, file in enumerate(files):
            axis.hlines(lines[0]["figures"]["base"][file]["pass@1"], j - 0.45, j + 0.45, colors="k", linestyles=":",
                        label="base model" if j == 0 else None)
        axis.set_xticks(range(len(files)), files)
        axis.set_ylabel(f"Pass@1, {data_of(lines)}")
        axis.set_ylim(bottom=0)  # an interval may go below
        axis.grid(axis="x", visible=False)
        axis.legend(ncols=1 if len(rows) < 5 else 2)
    caption(figure, f"Bars: mean; whiskers: {intervals(lines)}; dots: the seeds")
    return figure


def over_strength(plot, lines: list[dict]):
    """Pass@1 and Pass@k of the largest k on the first benchmark over q, a line a form (paper's Figure 1).

    q is what was selected, the mean over the end of the runs: less than was asked for where too few tokens score.
    """
    files, largest = benchmarks(lines)
    figure, found = panels(plot, lines, rows=2, height=3.3, sharex=True)
    for column, rows in found:
        zero = {row: runs for row, runs in rows.items() if row[1] is None}
        forms = list(dict.fromkeys(label for label, strength in rows if strength is not None))
        for axis, metric in zip(column, ("pass@1", largest)):
            for form, colour in zip(forms, colours(forms)):
                points = [*zero.values(), *(runs for (label, _), runs in rows.items() if label == form)]
                shares = [mean_interval([100 * report.value(line, ("training", "selection/fraction"))
                                         for line in runs.values()])[0] for runs in points]
                _, means, halves = zip(*(over_seeds(runs, metric, files[0]) for runs in points))
                axis.errorbar(shares, means, halves, marker="o", markersize=4, capsize=3, color=colour, label=form)
            axis.axhline(lines[0]["figures"]["base"][files[0]][metric], color=COLOURS["base model"], linestyle=":",
                         label="base model")
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
            axis.set(xlim=(-0.3, 130), ylabel=f"{metric.capitalize()}, {files[0]}")
        column[1].set_xlabel("q, % of tokens that pay")
    legend(figure, *axis.get_legend_handles_labels())
    caption(figure, f"On {data_of(lines, files[0])}. At 0 the method without a penalty. Bars: {intervals(lines)}")
    return figure


def frontier(plot, lines: list[dict]):
    """Pass@1 against Pass@k of the largest k on the first benchmark, over the strengths: a panel a row, each with
    SCOPE's line, pale, to compare with."""
    files, largest = benchmarks(lines)
    base = lines[0]["figures"]["base"][files[0]]
    labels = list(dict.fromkeys(line["row"] for line in lines if line["strength"] is not None)) or [lines[0]["row"]]
    sections, columns = list(dict.fromkeys(line["section"] for line in lines)), min(5, len(labels))
    deep = -(-len(labels) // columns)
    figure = plot.figure(figsize=(2.2 * columns + 1, (2.2 * deep + 0.8) * len(sections)), layout="constrained")
    star = {"marker": "*", "markersize": 9, "linestyle": "none"}
    for part, section in zip(figure.subfigures(len(sections), squeeze=False)[:, 0], sections):
        points: dict[str, list[tuple]] = {label: [] for label in ["SCOPE", *labels]}
        styles = {}  # of what every panel has
        for (label, strength), runs in report.by_row(lines, section).items():
            _, x, across = over_seeds(runs, "pass@1", files[0])
            _, y, up = over_seeds(runs, largest, files[0])
            points[label] = sorted([*points.get(label, []), (strength or 0.0, x, y, across, up)])
            if strength is None:
                styles[label] = star | {"color": COLOURS.get(label, GREY)}
        styles["SCOPE"] = {"marker": ".", "alpha": 0.4, "color": COLOURS["SCOPE"]}
        axes = part.subplots(deep, columns, sharex=True, sharey=True, squeeze=False).ravel()
        own = list(zip(axes, labels, colours(labels)))
        for axis, label, colour in own:
            axis.set_title(label, fontsize=10)
            axis.plot(base["pass@1"], base[largest], label="base model", color=COLOURS["base model"], **star)
            for name, style in (styles | {label: {"marker": "o", "markersize": 4, "color": colour}}).items():
                axis.plot([x for _, x, *_ in points[name]], [y for _, _, y, *_ in points[name]], label=name, **style)
        for axis in axes:  # before the bars: wide ones of few seeds would make the lines small
            axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
        for axis, label, colour in own:
            numbers: dict[tuple, list] = {}  # one for points that are too near to each other
            for strength, x, y, across, up in points[label]:
                axis.errorbar(x, y, up, across, color=colour, elinewidth=1, alpha=0.35)
                numbers.setdefault((round(x, 2), round(y, 2)), [x, y]).append(f"{strength:g}")
            for x, y, *strengths in numbers.values():
                axis.annotate(", ".join(strengths), (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
        for axis in axes[len(labels):]:
            axis.set_axis_off()
        part.suptitle(TITLES.get(section, section))
        part.supxlabel(f"Pass@1, {data_of(lines, files[0])}", fontsize=10)
        part.supylabel(largest.capitalize(), fontsize=10)
    handles = {name: handle for axis in figure.get_axes() for handle, name in zip(*axis.get_legend_handles_labels())
               if name == "SCOPE" or name not in labels}
    legend(figure, handles.values(), handles.keys())
    caption(figure, f"Numbers: λ. Bars: {intervals(lines)}")
    return figure


def pass_at_k_over_seeds(plot, lines: list[dict]):
    """Pass@k of base and rows on the first benchmark, with 95 % intervals over seeds, and below the difference of the
    second row from the first (paper's Figures 3 and 4)."""
    files, _ = benchmarks(lines)
    base = lines[0]["figures"]["base"][files[0]]
    ks = [int(metric[5:]) for metric in base if metric.startswith("pass@")]
    figure, found = panels(plot, lines, rows=2, height=3.3, sharex=True)
    for (above, below), rows in found:
        above.plot(ks, [base[f"pass@{k}"] for k in ks], color=COLOURS["base model"], linestyle="-.", label="base model")
        values = {row: {k: {seed: report.value(line, trained(f"pass@{k}", files[0])) for seed, line in runs.items()}
                        for k in ks} for row, runs in rows.items()}
        own = colours([label for label, _ in rows])
        for (row, of_k), colour in zip(values.items(), own):
            over_seeds_at(above, ks, of_k, color=colour, label=report.name_of(row))
        if len(values) > 1:
            (first, one), (second, other) = list(values.items())[:2]
            if both := one[1].keys() & other[1].keys():
                gap = {k: {seed: other[k][seed] - one[k][seed] for seed in both} for k in ks}
                over_seeds_at(below, ks, gap, color=own[1])
                below.set_title(f"{report.name_of(second)} − {report.name_of(first)}, seed by seed")
        over_k(above)
        above.set_ylabel(f"Pass@k, {files[0]}")
        above.legend()
        below.axhline(0, color="k", linewidth=0.8)
        below.set(xlabel="k", ylabel="difference in Pass@k")
    caption(figure, f"On {data_of(lines, files[0])}. Bands: {intervals(lines)}")
    return figure


def over_seeds_at(axis, ks: list[int], of_k: dict[int, dict], **style) -> None:
    """A line and its band from the values by k and seed."""
    points = [mean_interval(list(of_k[k].values())) for k in ks]
    low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
    curve(axis, ks, [mean for mean, _ in points], low, high, **style)
