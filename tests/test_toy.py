"""The embedded default: problems, the held-out split, the tokenizer, and the base model's folder."""

import json
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssForCausalLM,
)

import data
import toy
from support import models
from support.config import UserError, namespace, nest, override, read_defaults

COUNTDOWN = {"numbers": 4, "largest": 20, "limit": 99}
PROMPT = "{numbers} -> {target} :"
SMALL = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "updates": 2, "batch": 4, "lr": 1e-3, "seed": 0,
         "also": "3x20,2x30"}


def key(problem):
    return tuple(sorted(problem["numbers"])), problem["target"]


def test_heldout_problems_never_appear_in_training():
    """By construction: one function of the problem decides, whatever the order of its numbers."""
    heldout = {key(p) for p in data.countdown(300, heldout=True, **COUNTDOWN)}
    training = {key(p) for p in data.countdown(5000, heldout=False, **COUNTDOWN)}
    prompts = [prompt for prompt, _ in toy.chains(5000, random.Random(0), prompt=PROMPT, countdown=COUNTDOWN)]
    warm_start = set()
    for prompt in prompts:
        numbers, target = prompt.removesuffix(" :").split(" -> ")
        warm_start.add((tuple(sorted(map(int, numbers.split()))), int(target)))
    assert len(heldout) == 300 and len(training) == 5000
    assert not heldout & training and not heldout & warm_start
    # In a range so small that training meets every problem it may meet, the split still holds.
    few = {"numbers": 2, "largest": 6, "limit": 12}
    seen = {key(data.random_chain(rng, **few)[0]) for rng in [random.Random(1)] for _ in range(5000)}
    drawn = set()
    for prompt, _ in toy.chains(3000, random.Random(2), prompt=PROMPT, countdown=few):
        numbers, target = prompt.removesuffix(" :").split(" -> ")
        drawn.add((tuple(sorted(map(int, numbers.split()))), int(target)))
    kept = {k for k in seen if data.is_heldout(list(k[0]), k[1])}
    assert kept and drawn and not kept & drawn


def test_heldout_ignores_the_order_of_the_numbers():
    rng = random.Random(0)
    for _ in range(200):
        problem, _ = data.random_chain(rng, **COUNTDOWN)
        shuffled = rng.sample(problem["numbers"], 4)
        assert data.is_heldout(shuffled, problem["target"]) == data.is_heldout(**problem)


def test_random_chains_stay_in_range():
    rng = random.Random(0)
    for _ in range(1000):
        problem, chain = data.random_chain(rng, **COUNTDOWN)
        values = [int(step.split("=")[1]) for step in chain.split(",")]
        assert all(0 <= value <= 99 for value in values) and values[-1] == problem["target"]
        assert all(1 <= number <= 20 for number in problem["numbers"])


def test_too_few_problems_is_told():
    with pytest.raises(UserError, match="fewer than 100"):
        data.countdown(100, heldout=True, numbers=2, largest=2, limit=4)


def test_read_problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"numbers": [1, 2], "target": 3, "note": "x"}\n\n{"numbers": [4, 5], "target": 9}\n')
    assert data.read_problems(str(file)) == ([{"numbers": [1, 2], "target": 3}, {"numbers": [4, 5], "target": 9}], [])


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"numbers": [], "target": 1}', '{"numbers": [1.5], "target": 1}', "[" * 5000,
     '{"numbers": [true], "target": 1}', '{"numbers": [1]}', '{"numbers": "12", "target": 1}'],
)
def test_bad_rows_name_file_and_line(tmp_path, line):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"numbers": [1, 2], "target": 3}\n' + line + "\n")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2"):
        data.read_problems(str(file))


def test_a_files_rows_on_the_evaluations_side_are_left_out(tmp_path):
    problems = data.countdown(30, heldout=True, **COUNTDOWN) + data.countdown(50, heldout=False, **COUNTDOWN)
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, problems)))

    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, problems[:4])))

    def sets(evaluation):
        keys = override(read_defaults(), [f"data={tmp_path / 'p.jsonl'}", f"evaluation.data={evaluation}"])
        return data.problem_sets(namespace(nest(keys)))

    training, heldout, notes = sets("auto")
    assert len(training) == 50 and not any(data.is_heldout(**problem) for problem in training)
    assert len(heldout["auto"]) == 200 and all(data.is_heldout(**problem) for problem in heldout["auto"])
    assert len(notes) == 1 and "30 of 80 problems" in notes[0]
    training, heldout, notes = sets(str(tmp_path / "mine.jsonl"))
    assert (training, list(heldout.values())) == (problems[4:], [problems[:4]]) and "4 of 80 problems" in notes[0]


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        data.read_problems(str(tmp_path / "empty.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.base_model(tmp_path_factory.mktemp("toy") / "base", prompt=PROMPT, countdown=COUNTDOWN, toy=SMALL)


@pytest.mark.parametrize("loader", [PreTrainedTokenizerFast, AutoTokenizer])
def test_every_number_is_one_token_for_whoever_loads_the_folder(folder, loader):
    """And the spaces stay; AutoTokenizer would replace the tokenizer of a folder that says qwen2 by Qwen2's own."""
    tokenizer = loader.from_pretrained(folder)
    words = toy.SYMBOLS + [str(n) for n in range(100)]
    text = "13 5 7 20 -> 24 : 13*5=65, 65/13=5<eos>"
    expected = "13 5 7 20 -> 24 : 13 * 5 = 65 , 65 / 13 = 5 <eos>".split()
    assert [words[i] for i in tokenizer(text).input_ids] == expected
    assert tokenizer.decode(tokenizer(text).input_ids) == " ".join(expected)
    assert data.solves_countdown(tokenizer.decode(tokenizer("3*5=15, 15+7=22, 22+2=24<eos>").input_ids,
                                                  skip_special_tokens=True), [3, 5, 7, 2], 24)


def test_warm_start_learns_the_chain_and_its_end_not_the_prompt(monkeypatch):
    """The targets of its loss, in order, are the answers' tokens."""
    losses, own = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda x, y: losses.append(y.tolist()) or own(x, y))
    _, tokenizer = toy.warm_start(prompt=PROMPT, countdown=COUNTDOWN, **SMALL)
    pairs = toy.chains(SMALL["batch"], random.Random(SMALL["seed"]), prompt=PROMPT, countdown=COUNTDOWN,
                       also=SMALL["also"])
    answers = [tokenizer(f"{chain} {tokenizer.eos_token}").input_ids for _, chain in pairs]
    assert losses[0] == [token for answer in answers for token in answer] and len(losses) == SMALL["updates"]


def test_it_is_qwen2_weight_for_weight():
    """The same parameters from the same seed, and the same logits."""
    words = toy.make_tokenizer(20)
    shape = toy.model_shape(words, SMALL)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "pad_token_id")
    made = []
    for model_class, config in ((SeedOssForCausalLM, shape),
                                (Qwen2ForCausalLM, Qwen2Config(**{name: getattr(shape, name) for name in names}))):
        torch.manual_seed(3)
        made.append(model_class(config).eval())
    own, qwen2 = made
    assert own.state_dict().keys() == qwen2.state_dict().keys()
    assert all(torch.equal(own.state_dict()[name], weight) for name, weight in qwen2.state_dict().items())
    tokens = torch.arange(20)[None]
    assert torch.equal(own(tokens).logits, qwen2(tokens).logits)


def test_the_folder_is_an_ordinary_one(folder):
    model, tokenizer = models.load(str(folder))
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert models.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]


def test_reused_rebuilt_and_never_half_written(tmp_path, monkeypatch):
    calls = []
    warm_start = toy.warm_start
    monkeypatch.setattr(toy, "warm_start", lambda **settings: (calls.append(settings), warm_start(**settings))[1])

    def build(**changes):
        return toy.base_model(tmp_path / "base", prompt=PROMPT, countdown=COUNTDOWN, toy=SMALL | changes)

    build()
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    build()
    assert len(calls) == 1  # reused
    build(seed=1)
    assert len(calls) == 2 and (tmp_path / "base" / "model.safetensors").read_bytes() != weights  # rebuilt
    assert json.loads((tmp_path / "base" / "recipe.json").read_text())["toy"]["seed"] == 1

    save = PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *args: 1 / 0)  # killed while saving
    with pytest.raises(ZeroDivisionError):
        build(seed=2)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    build(seed=1)
    assert len(calls) == 3  # the folder of seed 1 is still whole
    (tmp_path / "base" / "recipe.json").unlink()  # half-written by whatever hand
    build(seed=1)
    assert len(calls) == 4
    assert [path.name for path in tmp_path.iterdir() if "tmp" not in path.name] == ["base"]


def test_a_change_of_the_generator_changes_the_recipe(tmp_path, monkeypatch):
    toy.base_model(tmp_path / "base", prompt=PROMPT, countdown=COUNTDOWN, toy=SMALL)
    chain = data.random_chain
    monkeypatch.setattr(toy, "random_chain", lambda rng, **kw: (chain(rng, **kw)[0], "1+1=2"))
    monkeypatch.setattr(toy, "warm_start", lambda **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # that is: it is built anew
        toy.base_model(tmp_path / "base", prompt=PROMPT, countdown=COUNTDOWN, toy=SMALL)
