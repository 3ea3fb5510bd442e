"""Where does SCOPE act? Which tokens it selects: a table, on the terminal, a page for a browser, and a picture.

    python -m analysis.tokens run=runs/a

Files go to out=analyses/. `run=` takes a run's model and settings; one process, any device. step: whose problems of the
training order are rolled out. shown: so many problems on the page.
"""

import html
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.one_step import Step, analysis_keys, draw_step, settings_of
from analysis.tokens_svg import svg
from support import config as configs
from support import distributed, help, report
from support.files import replace_text
from support.tables import aligned

KEYS = {"reward.kind": "accuracy", "selection.strategy": "scope", "shown": 4}  # shown: problems on the page

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
    return aligned(lines)


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


def ansi(tokens: list[View], largest: float) -> str:
    """A completion for the terminal: the redder, the higher the score; selected tokens bold and underlined."""
    reds = (None, 224, 217, 210, 203, 196)  # of the 256 colours, from pale to full
    words = []
    for token in tokens:
        red = reds[round(5 * token.score / largest)] if largest > 0 else None
        codes = ([f"48;5;{red}", "30"] if red else []) + (["1", "4"] if token.selected else [])
        text = token.text.replace("\n", "⏎").replace("\x1b", "")
        words.append(f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text)
    return " ".join(words)


STYLE = """body { font: 15px/1.5 ui-monospace, Menlo, Consolas, monospace; max-width: 62em; margin: 1.5em auto;
  padding: 0 1em 4em; color: #222; background: #fff }
h1 { font-size: 1.2em; overflow-wrap: anywhere } h2 { font-size: 1em; margin: 2em 0 0.3em; overflow-wrap: anywhere }
pre { line-height: 1.35; overflow-x: auto } summary { cursor: pointer; margin-top: 2em }
div { border-top: 1px solid #ddd; padding: 0.2em 0; line-height: 2.1 }
p.wrote { border-top: 1px solid #ddd; margin: 0; padding: 0.4em 0; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 15em; overflow-y: auto }
p.wrote .label { min-width: 20ch; margin-right: 1ch }
.label { color: #57606a; display: inline-block; min-width: 10em }
.bar { display: inline-block; width: 6em; height: 1em; vertical-align: -0.15em; border-radius: 3px;
  background: linear-gradient(90deg, rgba(255, 90, 60, 0), rgb(255, 90, 60)) }
span { padding: 2px 5px; border-radius: 3px; border: 2px solid transparent; cursor: help }
.selected { border-color: #b00020; font-weight: bold }
span:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0; padding: 0.6em 1em; background: #222;
  color: #fff; font-weight: normal; line-height: 1.5 }
@media (max-width: 45em) { body { font-size: 14px } .label { display: block; line-height: 1.5 } }"""


def html_page(title: str, table: str, groups: list[tuple[str, list[tuple[str, list[View]]]]], largest: float,
              samples: list[dict]) -> str:
    """One page without outside resources. groups: (prompt, [(label, tokens of a completion)]); samples: the run's."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>"
             "<meta name=viewport content='width=device-width, initial-scale=1'>"
             f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
             f"<pre>{html.escape(table)}</pre>"
             f"<p>Shaded by score p(1-p)[A]+: 0 <b class=bar></b> {largest:.3f}; "
             "<b style='border: 2px solid #b00020; border-radius: 3px; padding: 2px 5px'>framed</b>: selected, it pays "
             "the KL penalty. Rest the mouse on a token, or tap it, for its figures.</p>"]
    for prompt, completions in groups:
        parts.append(f"<h2>{html.escape(prompt)}</h2>")
        for label, tokens in completions:
            words = "\n".join(html_token(token, largest) for token in tokens)
            parts.append(f"<div><i class=label>{html.escape(label)}</i>{words}</div>")
    if samples:
        parts.append(f"<details><summary>What it wrote while it was trained: {len(samples)} completions</summary>")
        parts += [f"<p class=wrote><i class=label>step {row['step']}, reward {row['reward']:.3g}</i>"
                  f"<b>{html.escape(row['prompt'])}</b> {html.escape(row['completion'])}</p>" for row in samples]
        parts.append("</details>")
    return "\n".join(parts) + "\n"


def html_token(token: View, largest: float) -> str:
    shade = token.score / largest if largest > 0 else 0.0
    tip = (f"{token.role}: p {token.p:.3f}, entropy {token.entropy:.3f}, advantage {token.advantage:+.3f}, "
           f"score {token.score:.3f}{', selected' if token.selected else ''}")
    mark = ' class="selected"' if token.selected else ""
    text = html.escape(token.text.replace("\n", "⏎"))
    return (f'<span{mark} tabindex=0 style="background: rgba(255, 90, 60, {shade:.2f})" title="{html.escape(tip)}">'
            f"{text}</span>")


def main(arguments: list[str]) -> None:
    help.answer(arguments, __doc__)
    config = settings_of(analysis_keys(arguments, KEYS, {"shown": 1}))
    drawn = draw_step(config, distributed.setup(config.precision))
    every = [views(drawn, row) for row in range(len(drawn.correct))]
    flat = [token for row in every for token in row]
    table = role_table([t.role for t in flat], [t.selected for t in flat], [t.p for t in flat], [t.score for t in flat])
    title = f"{config.model}, step {config.step}: {config.selection.strategy} selects"
    title += f" {sum(t.selected for t in flat)} of {len(flat)} tokens"
    print(f"{title}\n{table}\n")

    most = sorted(range(len(drawn.problems)), key=lambda g: -drawn.selected[group_rows(g, config)].sum().item())
    shown = most[: config.shown]  # the problems with most selected tokens: in a group of equal rewards there are none
    largest = max(token.score for group in shown for token in sum(every[group_rows(group, config)], []))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    groups = []
    for group in shown:
        rows = range(*group_rows(group, config).indices(len(every)))
        prompt = drawn.run.tokenizer.decode(drawn.sampled.prompts[rows[0]])
        verdicts = ["right" if drawn.correct[row] else "wrong" for row in rows]
        groups.append((prompt, [(f"{verdict} A {drawn.advantages[row]:+.2f}", every[row])
                                for verdict, row in zip(verdicts, rows)]))
        print(prompt)
        for verdict in sorted(set(verdicts)):  # one of each
            row = every[rows[verdicts.index(verdict)]]
            line = ansi(row, largest) if colour else " ".join(f"[{t.text}]" if t.selected else t.text for t in row)
            print(f"  {verdict}  {line}")
    print("shaded by score, selected underlined" if colour else "[selected]; with colours on a terminal")
    file = Path(config.run) / "samples.jsonl"  # without run= nothing is known of the training
    samples = report.read_lines(file) if config.run else []
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "tokens.html", html_page(title, table, groups, largest, samples))
    prompt, completions = groups[0]
    replace_text(out / "tokens.svg", svg(prompt, examples(completions)))
    print(f"written: {out / 'tokens.html'}, {out / 'tokens.svg'}")


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
