"""Show where SCOPE acts: draw some completions with the scores of their tokens.

    python -m paper.tokens                                           # the untrained toy model
    python -m paper.tokens recipe=runs/a/config.yaml model=runs/a/model    # after a run of train.py

The picture is analyses/tokens.svg. A browser that opens it shows the numbers of the token under the
mouse.
"""

import html
import sys
from pathlib import Path

from paper.one_step import draw_step, token_scores
from support.config import load_config, one_line_errors, show_help
from support.distributed import start
from support.files import replace_text
from train import set_up

SETTINGS = {"step": 0, "out": "analyses/tokens.svg"}
CHARACTER = 8  # pixels: width of a character, with some to spare
LINE = 32
MARGIN = 20
LEFT = 140  # tokens begin here, labels at MARGIN
WIDTH = 680
LEGEND = "shade: p(1-p)[A]+; outlined: selected, these pay the KL penalty"
BOLD = 'font-weight="bold"'
GREY = 'fill="#6e7781"'
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def svg(prompt: str, completions: list[tuple[str, list[tuple]]]) -> str:
    """Draw the prompt, and below it completions with each token shaded by its score.

    A completion is (label, tokens), and a token is (text, p, entropy, score, selected).
    """
    largest = max(score for _, tokens in completions for *_, score, _ in tokens) or 1.0
    y = 34
    parts = [svg_text(MARGIN, y, prompt, BOLD)]
    for label, tokens in completions:
        x = LEFT
        y += LINE
        parts.append(svg_text(MARGIN, y, label, GREY))
        for text, p, entropy, score, selected in tokens:
            size = CHARACTER * len(text) + 10
            if x + size > WIDTH - MARGIN:
                x = LEFT
                y += LINE
            outline = ' stroke="#b00020" stroke-width="2"' if selected else ""
            parts.append(
                f"<g><title>p {p:.3f}, entropy {entropy:.3f}</title>"
                f'<rect x="{x}" y="{y - 17}" width="{size}" height="24" rx="4" '
                f'fill="#ff5a3c" fill-opacity="{score / largest:.2f}"{outline}/>'
            )
            parts.append(svg_text(x + 5, y, text, BOLD if selected else "") + "</g>")
            x += size + 4
    parts.append(svg_text(MARGIN, y + LINE, LEGEND, GREY))
    height = y + 2 * LINE
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-size="13" font-family="{FONT}">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def svg_text(x: int, y: int, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>'


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    config = load_config(arguments, SETTINGS)
    with start(config.precision) as world:
        run = set_up(config, world, Path("runs"))
        problems, rollout = draw_step(run, config.step)
    scores = token_scores(rollout)
    print(
        f"{config.model}, step {config.step}: {config.selection.strategy} selects "
        f"{int(rollout.selected.sum())} of {int(rollout.mask.sum())} tokens"
    )
    # Show completions of the group with the most selected tokens.
    groups = rollout.selected.sum(dim=1).view(-1, config.group_size)
    first = int(groups.sum(dim=1).argmax()) * config.group_size
    order = rollout.advantages[first : first + config.group_size].argsort(descending=True)
    columns = [rollout.logprobs.exp(), rollout.entropy, scores, rollout.selected]
    shown = []
    for row in (first + order[[0, 1, -2, -1]]).tolist():
        verdict = "right" if rollout.correct[row] else "wrong"
        label = f"{verdict} A {rollout.advantages[row]:+.2f}"
        completion = rollout.tokens[row][rollout.mask[row]].tolist()
        texts = [run.tokenizer.decode([token]) for token in completion]
        # zip ends with the texts, which have no padding
        shown.append((label, list(zip(texts, *(column[row].tolist() for column in columns)))))
    title = problems[first].get("problem") or run.tokenizer.decode(rollout.prompts[first])
    replace_text(Path(config.out), svg(title, shown))
    print(f"written: {config.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
