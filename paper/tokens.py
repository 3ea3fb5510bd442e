"""Show where SCOPE acts: which kinds of tokens it selects, and a picture of some completions.

    python -m paper.tokens                                           # the untrained toy model
    python -m paper.tokens recipe=runs/a/config.yaml model=runs/a/model    # after a run of train.py

The picture is analyses/tokens.svg. A browser that opens it shows the numbers of the token under the
mouse.
"""

import html
import sys
from pathlib import Path

import torch
from torch import Tensor

from evaluate import markdown_table
from paper.one_step import draw_step, token_scores
from support.config import load_config, one_line_errors, show_help
from support.distributed import start
from support.files import replace_text
from train import set_up

SETTINGS = {"step": 0, "out": "analyses/tokens.svg"}
SYMBOLS = dict.fromkeys("+-*/", "operator") | dict.fromkeys("=,", "separator")


def token_roles(tokens: list[str], stop: list[str]) -> list[str]:
    r"""Name the role of each token of an arithmetic answer.

    Numbers after `=` or in a \boxed{} are results, others are operands. Letters are words, but
    those of \boxed{}, and what has no other role, are format.

    >>> token_roles(["3", "*", "5", "=", "15", ",", "<eos>"], stop=["<eos>"])
    ['operand', 'operator', 'operand', 'separator', 'result', 'separator', 'stop']
    """
    roles = []
    after_equals = False
    in_box = False
    for token in tokens:
        word = token.strip()
        if token in stop:
            role = "stop"
        elif word.isdecimal():  # or a piece of a number
            role = "result" if after_equals or in_box else "operand"
        elif word.isalpha() and not in_box:
            role = "word"
        else:
            role = SYMBOLS.get(word, "format")
        if word and not word.isdecimal():
            after_equals = word == "="
            in_box = word.endswith("\\") or in_box and "}" not in word
        roles.append(role)
    return roles


def role_table(roles: list[str], selected: Tensor, scores: Tensor) -> str:
    """Write each role's share of all tokens and of the selected ones, and its mean score.

    The three arguments are flat, one entry per token of the step.
    """
    lines = []
    for role in sorted(set(roles)):
        of_role = torch.tensor([other == role for other in roles])
        share = of_role.float().mean()
        of_selected = selected[of_role].sum() / selected.sum().clamp(min=1)
        lines.append([role, f"{share:.1%}", f"{of_selected:.1%}", f"{scores[of_role].mean():.3f}"])
    return markdown_table(["role", "of all tokens", "of selected tokens", "mean score"], lines)


# ---------------------------------------------------------------- the picture

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
    stop = [run.tokenizer.decode([token]) for token in run.stop]
    texts = []
    roles = []
    for tokens, mask in zip(rollout.tokens, rollout.mask):
        texts.append([run.tokenizer.decode([token]) for token in tokens[mask].tolist()])
        roles += token_roles(texts[-1], stop)
    print(
        f"{config.model}, step {config.step}: {config.selection.strategy} selects "
        f"{int(rollout.selected.sum())} of {len(roles)} tokens"
    )
    print(role_table(roles, rollout.selected[rollout.mask], scores[rollout.mask]))
    # Show completions of the group with the most selected tokens.
    groups = rollout.selected.sum(dim=1).view(-1, config.group_size)
    first = int(groups.sum(dim=1).argmax()) * config.group_size
    order = rollout.advantages[first : first + config.group_size].argsort(descending=True)
    columns = [rollout.logprobs.exp(), rollout.entropy, scores, rollout.selected]
    shown = []
    for row in (first + order[[0, 1, -2, -1]]).tolist():
        verdict = "right" if rollout.correct[row] else "wrong"
        label = f"{verdict} A {rollout.advantages[row]:+.2f}"
        # zip ends with the texts, which have no padding
        shown.append((label, list(zip(texts[row], *(column[row].tolist() for column in columns)))))
    title = problems[first].get("problem") or run.tokenizer.decode(rollout.prompts[first])
    replace_text(Path(config.out), svg(title, shown))
    print(f"written: {config.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
