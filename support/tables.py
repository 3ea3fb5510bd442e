"""Tables in Markdown, for pages and for the terminal."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Write a table of texts: a header, a rule, and a line for each row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_table(summaries: dict[str, dict]) -> str:
    """Show models side by side: a line for each metric, its value and, where it has one, its standard error."""
    metrics = list(dict.fromkeys(name for summary in summaries.values() for name in summary))
    return markdown_table(["", *summaries], [[metric, *(cell(summary.get(metric)) for summary in summaries.values())]
                                             for metric in metrics])


def cell(metric: tuple | None) -> str:
    if metric is None:
        return "-"
    value, error = metric
    return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"


def difference_table(metrics: list[str], differences: dict[str, dict[str, tuple]]) -> str:
    """Show each model's difference from the first: its 95 % interval, and * where that leaves 0 out."""
    return markdown_table(["", *differences], [[metric, *(difference_cell(of_model.get(metric))
                                                         for of_model in differences.values())] for metric in metrics])


def difference_cell(difference: tuple | None) -> str:
    if difference is None:
        return "-"
    value, low, high = difference
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" + (" *" if low > 0 or high < 0 else "")
