"""Where does SCOPE act? Which tokens it selects: a table, and a picture.

    python -m analysis.tokens run=runs/a

Files go to out=analyses/. `run=` takes a run's model and settings; one process, any device.
"""

import html
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.one_step import Step, analysis_keys, draw_step, keys_of_an_analysis, settings_of
from support import config as configs
from support import distributed, help
from support.files import replace_text
from support.tables import markdown_table

KEYS = {"reward.kind": "accuracy", "selection.strategy": "scope"}

ROLES = ("operator", "operand", "result", "separator", "stop", "other")


def role_of_tokens(tokens: list[str], *, stop: tuple[str, ...] = ("<eos>",)) -> list[str]:
    """What each token of a Countdown chain is: the numbers between `=` and what follows are results, others operands.

    >>> role_of_tokens(["3", "*", "5", "=", "15", ",", "<eos>"])
    ['operand', 'operator', 'operand', 'separator', 'result', 'separator', 'stop']
    """
    roles, is_result = [], False
    for token in tokens:
        word = token.strip()
        if token in stop:
            role = "stop"
        elif word.isdecimal():  # also a number in pieces: all pieces after `=` are the result's
            role = "result" if is_result else "operand"
        else:
            role = "operator" if word in {"+", "-", "*", "/"} else "separator" if word in {"=", ","} else "other"
            is_result = word == "="
        roles.append(role)
    return roles


def role_table(roles: list[str], chosen: list[bool], p: list[float], scores: list[float]) -> str:
    """Each role's share of all tokens and of the selected ones, and their quotient."""
    every, taken = Counter(roles), Counter(role for role, is_chosen in zip(roles, chosen) if is_chosen)
    lines = [["role", "tokens", "share", "selected", "share of selected", "enrichment", "mean p", "mean score"]]
    for role in [role for role in ROLES if every[role]]:
        share, of_selected = every[role] / len(roles), taken[role] / max(1, taken.total())
        own = [i for i, other in enumerate(roles) if other == role]
        lines.append([role, str(every[role]), f"{share:.1%}", str(taken[role]), f"{of_selected:.1%}",
                      f"{of_selected / share:.2f}", f"{np.mean([p[i] for i in own]):.3f}",
                      f"{np.mean([scores[i] for i in own]):.3f}"])
    return markdown_table(lines[0], lines[1:])


class View(NamedTuple):
    """One token as it is shown."""

    text: str
    role: str
    p: float
    entropy: float
    advantage: float
    score: float
    selected: bool


def views(drawn: Step, row: int) -> list[View]:
    """The tokens of one completion."""
    sampled, valid = drawn.sampled, slice(0, int(drawn.sampled.lengths[row]))
    texts = [drawn.run.tokenizer.decode([token]) for token in sampled.tokens[row, valid].tolist()]
    roles = role_of_tokens(texts, stop=tuple(drawn.run.tokenizer.decode([token]) for token in drawn.run.stop))
    columns = [sampled.logprobs.exp(), sampled.entropy, drawn.advantages[:, None].expand_as(sampled.mask), drawn.scores,
               drawn.selected]
    return [View(*values) for values in zip(texts, roles, *(column[row, valid].tolist() for column in columns))]


CHARACTER, LINE = 8, 32  # pixels: the width of a character, with some to spare, and the height of a line
MARGIN, LEFT, RIGHT = 20, 140, 780  # where labels begin, and where tokens begin and end
LEGEND = "shade: p(1-p)[A]+; outlined: selected, these pay the KL penalty"


def svg(prompt: str, completions: list[tuple[str, list[View]]]) -> str:
    """The prompt, and below it completions (label, tokens); long ones go on in a new line.

    Browsers show a token's numbers while the mouse rests on it.
    """
    largest = max((token.score for _, tokens in completions for token in tokens), default=0.0) or 1.0
    prompt, y = textwrap.shorten(visible(prompt), 90, placeholder=" …"), 34
    parts, ends = [svg_text(MARGIN, y, prompt, bold=True)], [MARGIN + CHARACTER * max(len(prompt), len(LEGEND))]
    for label, tokens in completions:
        x, y = LEFT, y + LINE
        parts.append(svg_text(MARGIN, y, label, fill="#6e7781"))
        for token in tokens:
            word = visible(token.text)
            width = CHARACTER * len(word) + 10
            if x + width > RIGHT and x > LEFT:
                x, y = LEFT, y + LINE
            outline = ' stroke="#b00020" stroke-width="2"' if token.selected else ""
            title = f"p {token.p:.3f}, entropy {token.entropy:.3f}, A {token.advantage:+.3f}"
            parts.append(f'<g><title>{title}</title><rect x="{x}" y="{y - 17}" width="{width}" height="24" rx="4" '
                         f'fill="#ff5a3c" fill-opacity="{token.score / largest:.2f}"{outline}/>')
            parts.append(svg_text(x + width // 2, y, word, bold=token.selected, anchor="middle") + "</g>")
            ends.append(x + width)
            x += width + 4
    y += LINE + 8
    parts.append(svg_text(MARGIN, y, LEGEND, fill="#6e7781"))
    width, height = max(ends) + MARGIN, y + MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="13">\n'
            '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n")


def svg_text(x: int, y: int, text: str, *, bold: bool = False, fill: str = "#222222", anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}"{weight}>{html.escape(text)}</text>'


def visible(text: str) -> str:
    """The text on one line: XML forbids most control characters, and a rectangle needs something to stand in it."""
    text = text.replace("\n", "⏎")
    return "".join(character if character.isprintable() else "·" for character in text).strip() or "␣"


def main(arguments: list[str]) -> None:
    help.answer(arguments, __doc__, keys_of_an_analysis(KEYS))
    config = settings_of(analysis_keys(arguments, KEYS, {}))
    drawn = draw_step(config, distributed.setup(config.precision))
    every = [views(drawn, row) for row in range(len(drawn.correct))]
    flat = [token for row in every for token in row]
    table = role_table([t.role for t in flat], [t.selected for t in flat], [t.p for t in flat], [t.score for t in flat])
    title = f"{config.model}, step {config.step}: {config.selection.strategy} selects"
    title += f" {sum(t.selected for t in flat)} of {len(flat)} tokens"
    print(f"{title}\n{table}")

    problems = range(len(drawn.problems))  # in a group of equal rewards no token is selected: the picture shows another
    shown = max(problems, key=lambda group: drawn.selected[group_rows(group, config)].sum().item())
    rows = range(*group_rows(shown, config).indices(len(every)))
    prompt = drawn.run.tokenizer.decode(drawn.sampled.prompts[rows[0]])
    completions = [(f"{'right' if drawn.correct[row] else 'wrong'} A {drawn.advantages[row]:+.2f}", every[row])
                   for row in rows]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "tokens.svg", svg(prompt, examples(completions)))
    print(f"written: {out / 'tokens.svg'}")


def examples(completions: list[tuple[str, list[View]]], count: int = 2) -> list[tuple[str, list[View]]]:
    """Up to `count` right and as many wrong completions of different texts, those with most selected tokens first."""
    of_text = {"".join(token.text for token in tokens): (label, tokens) for label, tokens in completions}
    ordered = sorted(of_text.values(), key=lambda completion: -sum(token.selected for token in completion[1]))
    return [completion for word in ("right", "wrong")
            for completion in [other for other in ordered if other[0].startswith(word)][:count]]


def group_rows(group: int, config) -> slice:
    return slice(group * config.group_size, (group + 1) * config.group_size)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1:])
