"""Where SCOPE acts: roles, the table, the picture, and the command, as it is of one step."""

import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import yaml
from helpers import ALONE, ROOT

import step as steps
import toy
from analysis import one_step, tokens
from analysis.tokens import View, svg
from support import config as configs


@pytest.mark.parametrize("chain, roles", [
    ("3 * 5 = 15 , 15 + 7 = 22 <eos>", "d o d s r s d o d s r x"),
    ("3 * 5 = 1 5 , 2 - 2 = 0", "d o d s r r s d o d s r"),  # a number in pieces
    ("= 3 4 + 5", "s r r o d"),  # malformed from here on
    ("3 + = = 7 , , -> 8", "d o s s r s s ? d"),
    ("<pad> 3 : x15 1.5", "? d ? ? ?"),
    (", 3 <eos> <eos> 4", "s d x x d"),
    ("6 / 3", "d o d"),
    ("", ""),
])
def test_roles(chain, roles):
    names = {"d": "operand", "o": "operator", "s": "separator", "r": "result", "x": "stop", "?": "other"}
    assert tokens.role_of_tokens(chain.split()) == [names[role] for role in roles.split()]


def test_roles_of_other_tokenizers():
    assert tokens.role_of_tokens([" 3", "+", " 4", " =", "7", "</s>"], stop=("</s>",))[-2:] == ["result", "stop"]


def test_role_table_by_hand():
    roles = ["operand"] * 6 + ["operator"] * 3 + ["stop"]
    table = tokens.role_table(roles, [True] * 3 + [False] * 3 + [True] + [False] * 3, [0.5] * 10, [0.1] * 10)
    operator, operand, stop = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert operand == ["operand", "6", "60.0%", "3", "75.0%", "1.25", "0.500", "0.100"]
    assert operator[4:6] == ["25.0%", "0.83"] and stop[3:6] == ["0", "0.0%", "0.00"]
    assert "0.00" in tokens.role_table(roles, [False] * 10, [0.5] * 10, [0.0] * 10)  # nothing selected


def view(text, score=0.0, selected=False):
    return View(text, "operand", 0.5, 0.7, 2.0, score, selected)


def test_views():
    """A completion's own tokens, without padding, each with its own numbers."""
    words = {7: "3", 8: "*", 1: "</s>"}
    tokenizer = SimpleNamespace(decode=lambda ids: words[ids[0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    sampled = SimpleNamespace(tokens=torch.tensor([[7, 8, 7], [8, 1, 0]]), lengths=mask.sum(dim=1), mask=mask,
                              logprobs=torch.tensor([[0.5, 0.25, 1.0], [0.125, 0.75, 1.0]]).log(),
                              entropy=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))
    drawn = SimpleNamespace(run=SimpleNamespace(tokenizer=tokenizer, stop=[1]), sampled=sampled,
                            advantages=torch.tensor([1.0, -2.0]), scores=torch.arange(6.0).view(2, 3),
                            selected=torch.tensor([[False, True, False], [True, False, False]]))
    first, second = tokens.views(drawn, 0), tokens.views(drawn, 1)
    assert [(token.text, token.role, token.selected) for token in first] == [
        ("3", "operand", False), ("*", "operator", True), ("3", "operand", False)]
    assert [(token.text, token.role, token.selected) for token in second] == [("*", "operator", True),
                                                                              ("</s>", "stop", False)]
    assert second[0][2:6] == pytest.approx((0.125, 0.4, -2.0, 3.0))


# ---------------------------------------------------------------- the picture


def test_examples():
    """Two right and two wrong ones, the same text once, most selected tokens first."""
    def completion(label, text, selected=0):
        return label, [view(word, selected=i < selected) for i, word in enumerate(text.split())]

    right, more, again = (completion("right A +1.00", text, n) for text, n in (("a b", 0), ("a b c", 2), ("a b c", 2)))
    most, wrong = completion("right A +1.00", "a b d", 3), completion("wrong A -1.00", "x y")
    assert tokens.examples([wrong, right, more, again, most]) == [most, more, wrong]
    assert tokens.examples([more, again, right]) == [more, right]
    assert tokens.examples([wrong, completion("wrong A -1.00", "x z"), completion("wrong A -1.00", "y")]) == [
        wrong, completion("wrong A -1.00", "x z")]


def elements(text: str, name: str) -> list:
    return list(ElementTree.fromstring(text).iter(f"{{http://www.w3.org/2000/svg}}{name}"))


def test_svg_shows_every_token():
    """Red by score over the largest, outlined and bold if selected; what XML forbids is not in it."""
    nasty = [view("<b>&\"", 0.4, True), view(" 15"), view("a\nb\x1b\x00", 0.1), view("  ", 0.2, True), view("\ud800")]
    text = svg("1 < 2\n\x07", [("right A +1.20", nasty), ("wrong A -1.20", [view("7")])])
    card, *rectangles = elements(text, "rect")
    assert card.get("fill") == "#ffffff" and (card.get("width"), card.get("height")) == ("100%", "100%")
    assert [float(r.get("fill-opacity")) for r in rectangles] == [1, 0, 0.25, 0.5, 0, 0]
    assert [bool(r.get("stroke")) for r in rectangles] == [True, False, False, True, False, False]
    prompt, label, *words, legend = elements(text, "text")
    assert prompt.text == "1 < 2⏎·" and label.text == "right A +1.20" and "KL penalty" in legend.text
    assert [(word.text, word.get("font-weight")) for word in words] == [
        ('<b>&"', "bold"), ("15", None), ("a⏎b··", None), ("␣", "bold"), ("·", None), ("wrong A -1.20", None),
        ("7", None)]
    titles = elements(text, "title")
    assert len(titles) == 6 and titles[0].text == "p 0.500, entropy 0.700, A +2.000"  # shown under the mouse


def test_svg_holds_what_it_shows():
    """Nothing overlaps or leaves the card: neither many tokens, which go on in new lines, nor a very long one."""
    for texts, prompt in ((["total"] * 60, "word " * 99), (["+"], ""), (["x" * 200, "y"], "p")):
        text = svg(prompt, [("right A +1.20", [view(word) for word in texts])] * 2)
        root, (_, *rectangles), words = ElementTree.fromstring(text), elements(text, "rect"), elements(text, "text")
        width, height = (float(root.get(side)) for side in ("width", "height"))
        assert width <= 800 or len(texts) == 2
        assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
        spans = {}
        for rectangle in rectangles:
            x, y, wide, high = (float(rectangle.get(name)) for name in ("x", "y", "width", "height"))
            assert 140 <= x and x + wide < width and 0 < y and y + high < height
            assert x >= spans.get(y, 0)
            spans[y] = x + wide
        assert all(b - a > 24 for a, b in zip(sorted(spans), sorted(spans)[1:]))
        middles = [float(r.get("x")) + float(r.get("width")) // 2 for r in rectangles]
        assert [float(word.get("x")) for word in words if word.get("text-anchor") == "middle"] == middles
        for word in words:
            if word.get("text-anchor") == "start":
                assert float(word.get("x")) + 8 * len(word.text or "") < width and float(word.get("y")) < height
        assert len(spans) == {60: 12, 1: 2, 2: 4}[len(texts)]
    assert max(spans.values()) > 1600  # one token as wide as that is shown whole


# ---------------------------------------------------------------- one step


def settings(arguments):
    return one_step.settings_of(one_step.analysis_keys(arguments, tokens.KEYS, {}))


def test_the_step_is_that_of_training(in_tmp, small):
    config = settings([*small, "step=2", "seed=5", "reward.kind=accuracy"])
    drawn = one_step.draw_step(config, ALONE)
    assert drawn.problems == steps.step_problems(drawn.run.problems, 2, count=6, seed=5) and len(drawn.correct) == 24
    assert torch.equal(drawn.sampled.tokens, steps.sample(drawn.run, *steps.draw_problems(drawn.run, 2), 2).tokens)
    mask, p = drawn.sampled.mask, drawn.sampled.logprobs.exp()
    groups = drawn.correct.view(6, 4).double()
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)
    assert drawn.correct.any() and torch.allclose(drawn.advantages.double(), advantages.flatten(), atol=1e-4)
    scores = torch.where(mask, p * (1 - p) * drawn.advantages.clamp(min=0)[:, None], 0)
    assert torch.allclose(drawn.scores, scores)
    count = round(0.2 * int(mask.sum()))
    assert int(drawn.selected.sum()) == min(count, int((scores > 0).sum()))
    assert drawn.scores[drawn.selected].min() >= drawn.scores[mask & ~drawn.selected].max()
    forking = drawn.sampled.entropy[drawn.forking]
    assert forking.min() >= drawn.sampled.entropy[mask & ~drawn.forking].max()
    assert len(forking) == pytest.approx(config.forking_fraction * int(mask.sum()), abs=1)
    seed = 5 * 1_000_003 + 2  # train.py's: random choices fall alike too
    uniform = one_step.draw_step(settings([*small, "step=2", "seed=5", "selection.strategy=uniform"]), ALONE)
    assert torch.equal(uniform.sampled.tokens, drawn.sampled.tokens)
    config.selection.strategy = "uniform"
    again = steps.select(drawn.sampled, drawn.sampled.logprobs, drawn.advantages, config, seed)
    assert torch.equal(uniform.selected, again.selected) and not torch.equal(uniform.selected, drawn.selected)


def make_run(folder: str, arguments: list[str]) -> None:
    """A toy's untrained model as a finished run."""
    keys = configs.override(configs.read_defaults(), arguments)
    made = Path(toy.model_folder("toy", configs.namespace(configs.nest(keys))))
    Path(folder).mkdir(parents=True)
    made.rename(Path(folder) / "model")
    Path(folder, "config.yaml").write_text(yaml.safe_dump(configs.nest(keys)))


def test_settings_of_a_run(in_tmp, small):
    """A run's settings and model, of its strategy or, where it selected nothing, of SCOPE."""
    for strategy, shown in (("none", "scope"), ("entropy_change", "entropy_change")):
        make_run(f"runs/{strategy}", [*small, f"selection.strategy={strategy}", "selection.fraction=0.3"])
        keys = one_step.analysis_keys([f"run=runs/{strategy}"], tokens.KEYS, {})
        assert (keys["selection.strategy"], keys["selection.fraction"]) == (shown, 0.3)
    Path("runs/none/model/config.json").unlink()
    with pytest.raises(configs.UserError, match="run=runs/none: no model/config.json"):
        one_step.analysis_keys(["run=runs/none"], tokens.KEYS, {})


def test_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(configs.UserError, match="one process"):
        one_step.analysis_keys([], {}, {})


# ---------------------------------------------------------------- the command


def test_command_of_a_run(in_tmp, small, capsys, monkeypatch):
    """run= gives the settings and the model; further keys on the command line win."""
    make_run("runs/a", [*small, "seed=4", "steps=2"])
    arguments = ["run=runs/a", "group_size=5"]
    keys = one_step.analysis_keys(arguments, tokens.KEYS, {})
    assert (keys["seed"], keys["group_size"], keys["max_new_tokens"]) == (4, 5, 10)
    assert keys["model"] == "runs/a/model" and "steps" not in keys
    tokens.main(arguments)
    told = capsys.readouterr().out
    total = int(re.search(r"selects (\d+) of (\d+) tokens", told)[1])
    assert "operand" in told and "share of selected" in told

    drawn = one_step.draw_step(settings(arguments), ALONE)
    per_problem = drawn.selected.view(6, -1).sum(dim=1)
    assert total == per_problem.sum() > 0
    shown = per_problem.argsort(descending=True, stable=True)[0].item()  # the problem with most selected tokens
    rows = range(5 * shown, 5 * shown + 5)
    prompt = drawn.run.tokenizer.decode(drawn.sampled.prompts[rows[0]])
    picture = Path("analyses/tokens.svg").read_text()
    head, *words = (element.text for element in elements(picture, "text"))
    assert head == prompt.strip() and elements(picture, "rect")[0].get("fill") == "#ffffff"
    labels = [word for word in words if re.match("(right|wrong) A", word)]
    of_row = {f"{'right' if drawn.correct[row] else 'wrong'} A {drawn.advantages[row]:+.2f}" for row in rows}
    assert set(labels) == of_row and labels == sorted(labels) and len(labels) <= 4
    assert sum(bool(rectangle.get("stroke")) for rectangle in elements(picture, "rect")) > 0


@pytest.mark.parametrize("arguments, words", [
    (["contexts=3"], "unknown config key"), (["run=nowhere"], "run=nowhere: no config.yaml"),
    (["model=./nowhere"], "no such folder"), (["forking_fraction=0.0"], "forking_fraction=0.0"),
    (["forking_fraction=1.0"], "forking_fraction=1.0"), (["step=-1"], "step=-1"), (["shown=3"], "unknown"),
    (["group_size=1"], "group_size=1"), (["temperature=0.0"], "temperature=0.0"), (["out=file"], "out=file is a file"),
    (["reward=praise"], "self_certainty"), (["selection.strategy=best"], "scope")])
def test_bad_input(tmp_path, monkeypatch, small, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(configs.UserError) as error:
        tokens.main([*small, *arguments])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_as_a_command_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended, configs.one_line_errors():
        tokens.main(["model=nowhere"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and len(told.splitlines()) == 1 and "no such folder" in told
    for name in ("tokens", "tightness", "law"):  # which test_law.py starts as a command
        last = (ROOT / "analysis" / f"{name}.py").read_text().partition("__main__")[2]
        assert last == '":\n    with configs.one_line_errors():\n        main(sys.argv[1:])\n', name
