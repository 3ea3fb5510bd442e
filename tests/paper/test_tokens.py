"""Where SCOPE acts: the picture, and the command."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from paper import tokens
from paper.one_step import draw_step
from support.config import load_config
from support.distributed import World
from train import set_up

# ---------------------------------------------------------------- the picture


def view(text, score=0.0, selected=False):
    return text, 0.5, 0.7, score, selected


def elements(text: str, name: str) -> list:
    return list(ElementTree.fromstring(text).iter(f"{{http://www.w3.org/2000/svg}}{name}"))


def test_svg_shows_every_token():
    """Red by score over the largest; outlined and bold if selected."""
    first = [view('<b>&"', 0.4, True), view("15"), view("7", 0.1), view("+", 0.2, True)]
    text = tokens.svg("1 < 2", [("right A +1.20", first), ("wrong A -1.20", [view("7")])])
    _, *rectangles = elements(text, "rect")
    assert [float(r.get("fill-opacity")) for r in rectangles] == [1, 0, 0.25, 0.5, 0]
    assert [r.get("stroke") is not None for r in rectangles] == [True, False, False, True, False]
    words = [(word.text, word.get("font-weight")) for word in elements(text, "text")]
    assert words == [
        ("1 < 2", "bold"),
        ("right A +1.20", None),
        ('<b>&"', "bold"),
        ("15", None),
        ("7", None),
        ("+", "bold"),
        ("wrong A -1.20", None),
        ("7", None),
        (tokens.LEGEND, None),
    ]
    titles = [title.text for title in elements(text, "title")]
    assert titles == ["p 0.500, entropy 0.700"] * 5  # shown under the mouse


def test_svg_holds_what_it_shows():
    """Nothing overlaps or leaves the card: many tokens go on in new lines."""
    completion = "right A +1.20", [view("total")] * 60
    text = tokens.svg("a prompt", [completion] * 2)
    root = ElementTree.fromstring(text)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    ends = {}
    _, *rectangles = elements(text, "rect")
    for rectangle in rectangles:
        x, y, wide, high = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
        assert tokens.LEFT <= x and x + wide < width and 0 < y and y + high < height
        assert x >= ends.get(y, 0)
        ends[y] = x + wide
    assert len(rectangles) == 120 and len(ends) == 14
    assert min(b - a for a, b in zip(sorted(ends), sorted(ends)[1:])) > 24
    for word in elements(text, "text"):
        assert float(word.get("x")) + 8 * len(word.text) < width
        assert float(word.get("y")) < height


# ---------------------------------------------------------------- the command


def test_command(in_tmp, small, capsys):
    """Two best and two worst completions of the group with the most selected tokens."""
    arguments = [*small, "group_size=5", "seed=2"]
    tokens.main(arguments)
    printed = capsys.readouterr().out
    config = load_config(arguments, tokens.SETTINGS)
    run = set_up(config, World(), Path("runs"))
    _, rollout = draw_step(run, 0)
    selected, total = map(int, re.search(r"selects (\d+) of (\d+) tokens", printed).groups())
    per_problem = rollout.selected.view(6, -1).sum(dim=1)
    assert selected == per_problem.sum() > 0 and total == rollout.mask.sum()
    first = 5 * int(per_problem.argmax())
    assert first > 0
    picture = Path("analyses/tokens.svg").read_text()
    prompt, *words = (element.text for element in elements(picture, "text"))
    assert prompt == run.tokenizer.decode(rollout.prompts[first])
    labels = [word for word in words if re.match("(right|wrong) A", word)]
    ranked = sorted(rollout.advantages[first : first + 5].tolist(), reverse=True)
    shown = [ranked[i] for i in (0, 1, -2, -1)]
    assert [float(label.split()[-1]) for label in labels] == pytest.approx(shown, abs=0.006)
    assert [label.split()[0] == "right" for label in labels] == [value > 0 for value in shown]
    columns = [rollout.tokens, rollout.logprobs.exp(), rollout.entropy]
    group = rollout.mask.clone()
    group[:first] = group[first + 5 :] = False
    known = set()
    for token, p, entropy in zip(*(column[group].tolist() for column in columns)):
        known.add((f"p {p:.3f}, entropy {entropy:.3f}", run.tokenizer.decode([token])))
    shown = {tuple(part.text for part in token if part.text) for token in elements(picture, "g")}
    assert shown <= known
    outlined = [r for r in elements(picture, "rect") if r.get("stroke")]
    assert len(outlined) <= int(per_problem.max())
