"""Tests of toy.py: the tokenizer, the warm start and the folder of the embedded base model."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ALONE, ROOT, config_of
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssForCausalLM,
)

import data
import toy
from rewards import solves_countdown
from rollout import decode, sample
from support import models

SMALL = ["toy.layers=1", "toy.hidden=16", "toy.updates=2", "toy.batch=4"]


def recipe(*arguments):
    return toy.make_recipe(config_of(*SMALL, *arguments))


@pytest.mark.parametrize(
    "arguments", [[], ["countdown.numbers=2", "countdown.largest=6", "countdown.limit=12"]]
)
def test_the_warm_start_never_meets_a_heldout_problem(arguments):
    """Not even in a range so small that it meets every problem that it may meet."""
    for prompt, _ in toy.random_pairs(3000, random.Random(0), recipe(*arguments)):
        numbers, target = prompt.removesuffix(" :").split(" -> ")
        assert not data.is_heldout(list(map(int, numbers.split())), int(target))


def test_it_meets_other_kinds_of_problems_too():
    pairs = toy.random_pairs(300, random.Random(0), recipe())
    assert {len(prompt.partition(" -> ")[0].split()) for prompt, _ in pairs} == {3, 4, 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "base"
    toy.save_base_model(path, recipe())
    return path


@pytest.mark.parametrize("loader", [PreTrainedTokenizerFast, AutoTokenizer])
def test_every_number_is_one_token_for_whoever_loads_the_folder(folder, loader):
    """AutoTokenizer would replace the tokenizer of a folder that says qwen2 by Qwen2's."""
    tokenizer = loader.from_pretrained(folder)
    words = toy.SYMBOLS + [str(n) for n in range(100)]
    text = "13 5 7 20 -> 24 : 13*5=65, 65/13=5<eos>"
    expected = "13 5 7 20 -> 24 : 13 * 5 = 65 , 65 / 13 = 5 <eos>".split()
    assert [words[i] for i in tokenizer(text).input_ids] == expected
    assert tokenizer.decode(tokenizer(text).input_ids) == " ".join(expected)
    chain = tokenizer("3*5=15, 15+7=22, 22+2=24<eos>").input_ids
    assert solves_countdown(tokenizer.decode(chain, skip_special_tokens=True), [3, 5, 7, 2], 24)


def test_the_warm_start_learns_the_chain_and_its_end_but_not_the_prompt(monkeypatch):
    """The targets of its loss, in order, are the tokens of the answers."""
    targets = []
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(logits, labels):
        targets.append(labels.tolist())
        return cross_entropy(logits, labels)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    _, tokenizer = toy.warm_start(recipe())
    pairs = toy.random_pairs(4, random.Random(0), recipe())
    answers = [tokenizer(f"{chain} {tokenizer.eos_token}").input_ids for _, chain in pairs]
    assert targets[0] == sum(answers, [])
    assert len(targets) == 2


def test_it_is_qwen2_weight_for_weight():
    """The same seed gives the same parameters and the same logits."""
    shape = toy.model_shape(toy.make_tokenizer(20), hidden=16, layers=1)
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "eos_token_id",
        "pad_token_id",
    )
    qwen2_shape = Qwen2Config(**{name: getattr(shape, name) for name in names})
    torch.manual_seed(3)
    model = SeedOssForCausalLM(shape).eval()
    torch.manual_seed(3)
    qwen2 = Qwen2ForCausalLM(qwen2_shape).eval()
    assert model.state_dict().keys() == qwen2.state_dict().keys()
    for name, weight in qwen2.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, qwen2(tokens).logits)


def test_the_model_of_the_default_settings_is_shipped(monkeypatch):
    """It writes valid chains, and few of them reach the target."""
    monkeypatch.setattr(toy, "warm_start", None)
    config = config_of()
    folder = toy.resolve_model(config, ALONE)
    assert folder == str(ROOT / "recipes" / "toy-base")
    model, tokenizer = models.load(folder)
    problems = data.countdown(100, heldout=True, **vars(config.countdown))
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    settings = dict(stop=[tokenizer.eos_token_id], max_new_tokens=32, seed=0, step=0)
    texts = decode(tokenizer, sample(model, prompts, list(range(100)), **settings))
    valid = 0
    solved = 0
    for problem, text in zip(problems, texts):
        reached = text.rpartition("=")[2].strip()
        valid += reached.isdecimal() and solves_countdown(text, problem["numbers"], int(reached))
        solved += solves_countdown(text, **problem)
    assert valid > 30
    assert 0 < solved < 40


def test_it_is_trained_once_for_each_recipe_and_never_half_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    warm_start = toy.warm_start

    def spy(recipe):
        calls.append(recipe)
        return warm_start(recipe)

    monkeypatch.setattr(toy, "warm_start", spy)

    def resolve(*arguments):
        return Path(toy.resolve_model(config_of(*SMALL, *arguments), ALONE))

    with ThreadPoolExecutor() as pool:  # two at once: the second waits for the first
        first, second = pool.map(lambda _: resolve(), range(2))
    assert first == second == resolve()
    assert len(calls) == 1
    other = resolve("toy.seed=1")
    assert len(calls) == 2
    assert json.loads((other / "recipe.json").read_text())["toy"]["seed"] == 1
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert toy.resolve_model(config_of(), ALONE, "some/model") == "some/model"

    with monkeypatch.context() as patch:  # killed while saving
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve("toy.seed=2")
    resolve("toy.seed=2")
    assert len(calls) == 4
    folders = [path for path in Path("runs").iterdir() if path.is_dir()]
    assert all((path / "tokenizer.json").exists() for path in folders)
    assert len(folders) == 3


def test_a_change_of_the_generator_changes_the_recipe(monkeypatch):
    before = recipe()
    random_chain = data.random_chain
    monkeypatch.setattr(
        toy, "random_chain", lambda rng, **kinds: (random_chain(rng, **kinds)[0], "")
    )
    assert recipe() != before
