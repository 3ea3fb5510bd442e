"""Tables in text."""

import math

WIDTH = 100  # of a terminal


def aligned(lines: list[list[str]], width: float = math.inf) -> str:
    """A table of texts, the first line its head, the first column its labels, the others aligned on the right.

    Columns that do not fit the width go into further tables below, each with the labels.
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    blocks, taken = [[]], widths[0]
    for column in range(1, len(widths)):
        if taken + 2 + widths[column] > width and blocks[-1]:
            blocks.append([])
            taken = widths[0]
        blocks[-1].append(column)
        taken += 2 + widths[column]
    tables = ["\n".join("  ".join(line[i].rjust(widths[i]) for i in [0, *block]) for line in lines) for block in blocks]
    return "\n\n".join(tables)


def format_table(summaries: dict[str, dict]) -> str:
    """Models by their metrics: value, and its standard error where it has one. A line a model, or where that is too
    wide a line a metric."""
    columns = list(dict.fromkeys(name for metrics in summaries.values() for name in metrics))

    def cell(metric):
        if metric is None:
            return "-"
        value, error = metric
        return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"

    lines = [["", *columns]] + [[label, *(cell(metrics.get(name)) for name in columns)]
                                for label, metrics in summaries.items()]
    if sum(2 + max(len(line[i]) for line in lines) for i in range(len(lines[0]))) - 2 > WIDTH:
        lines = [list(line) for line in zip(*lines)]
    return aligned(lines, WIDTH)


def difference_table(rows: list[str], differences: dict[str, dict[str, tuple]]) -> str:
    """A line a metric, a column a model: the difference, its 95 % interval, and * where that leaves 0 out."""

    def cell(found: tuple | None) -> str:
        if found is None:
            return "-"
        value, low, high = found
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] {'*' if low > 0 or high < 0 else ' '}"

    lines = [[row, *(cell(own.get(row)) for own in differences.values())] for row in rows]
    return aligned([["", *differences], *lines], WIDTH)
