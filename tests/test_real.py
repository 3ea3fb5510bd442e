"""Tests with Hugging Face folders on problems of mathematics: runs, evaluation, recipes, memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, config_of, write_jsonl
from mathematics import GSM8K, MATH, SMALL, folder, tokenizer
from transformers import Qwen2Config

import evaluate
import rewards
import train
from support import memory, models
from support.config import UserError, flatten
from support.files import read_jsonl

# the models of the paper
RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - {ROOT / "recipes" / "smollm2-135m.yaml"})


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K)
    write_jsonl(tmp_path / "math.jsonl", MATH)
    return tmp_path


@pytest.mark.parametrize("architecture, file", [("qwen2", "math"), ("llama", "gsm8k")])
def test_a_run_on_mathematics(in_tmp, capsys, architecture, file):
    """A random model solves nothing, but its confidence varies: a label-free reward."""
    model = folder(in_tmp / architecture, architecture, chat=True)
    train.main(
        [
            *SMALL,
            f"model={model}",
            f"data={file}.jsonl",
            "name=run",
            "validation_fraction=0.3",
            "gradient_checkpointing=true",
            "reward=self_certainty",
        ]
    )
    rows = read_jsonl(Path("runs/run/metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    family = "llama" if architecture == "llama" else "qwen"
    largest_entropy = np.log(len(tokenizer(family, chat=True)))
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
    for row in rows[1:3]:
        assert 0.9 * largest_entropy < row["entropy"] < largest_entropy
        assert row["logprob_drift"] < 1e-4
        assert row["length/mean"] <= 12
        assert row["grad_norm"] > 0
        assert 0 < row["selection/fraction"] <= 0.31
    printed = capsys.readouterr().out
    problem = GSM8K[0]["question"] if file == "gsm8k" else "Find the root of $"
    assert problem[:20] in printed
    assert "first prompt" in printed
    assert "stop ids" in printed
    assert "<|im_start|>user" in printed or "<|start_header_id|>user" in printed
    if architecture == "qwen2":
        anyone_can_load(in_tmp / "runs" / "run" / "model")


# Loads the folder with transformers alone: text survives the tokenizer, `pipeline` works, and
# `generate` stops where training stopped, for a model that can sample nothing else.
ANYONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(text).input_ids
assert tokenizer.decode(ids) == text, (text, tokenizer.decode(ids))
out = pipeline("text-generation", model=folder, max_new_tokens=4)(text)
assert out[0]["generated_text"].startswith(text), out
stop = model.generation_config.eos_token_id
model.get_output_embeddings().weight.data.zero_()
project = model.lm_head.forward
for token in stop:
    only = torch.tensor([token])
    model.lm_head.forward = lambda hidden: project(hidden).index_fill(-1, only, 9)
    generated = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4)
    assert generated.shape[1] == len(ids) + 1
assert not {"rollout", "toy", "data", "support", "train"} & set(sys.modules)
print(json.dumps(sorted(stop)))
"""


def anyone_can_load(saved):
    process = subprocess.run(
        [sys.executable, "-c", ANYONE, saved, "Find the root of $x"],
        cwd=saved,
        text=True,
        capture_output=True,
        timeout=170,
    )
    assert process.returncode == 0, process.stderr
    ends = tokenizer("qwen", chat=True).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads(process.stdout) == sorted(ends)


def test_verifiable_rewards_reach_the_update(in_tmp, monkeypatch):
    """The real grader reads real text: every second completion boxes the gold answer."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    same = [MATH[0] | {"problem": f"{MATH[0]['problem']} ({i})"} for i in range(20)]
    write_jsonl(in_tmp / "same.jsonl", same)

    def decode(tokenizer, rollout):
        texts = [r"so \boxed{\frac{2}{7}}", r"so \boxed{-1}"]
        return [texts[i % 2] for i in range(len(rollout.prompts))]

    monkeypatch.setattr(rewards, "decode", decode)
    # Every token stops, so that no completion is truncated.
    monkeypatch.setattr(models, "stop_ids", lambda model, words: list(range(len(words))))
    train.main([*SMALL, f"model={model}", "data=same.jsonl", "name=run", "validation_fraction=0.3"])
    for row in read_jsonl(Path("runs/run/metrics.jsonl"))[1:3]:
        assert row["reward/mean"] == 0.5
        assert row["group/frac_zero_std"] == 0


def test_evaluation_prompts_as_training_did(in_tmp, capsys):
    """recipe=runs/x/config.yaml brings the run's prompt; another prompt is noted."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    train.main(
        [
            *SMALL,
            f"model={model}",
            "data=math.jsonl",
            "name=run",
            "steps=1",
            "prompt.system=Think hard.",
            "evaluation.data=gsm8k.jsonl",
        ]
    )
    arguments = ["recipe=runs/run/config.yaml", "model=runs/run/model", "samples=2", "problems=2"]
    config = evaluate.load_evaluation_config(arguments)
    assert config.prompt.system == "Think hard."
    assert config.data == "gsm8k.jsonl"
    assert config.max_new_tokens == 12
    capsys.readouterr()
    evaluate.main(arguments)
    assert "trained with" not in capsys.readouterr().err
    evaluate.main([*arguments, "prompt.system=", "grader=math_verify"])
    printed = capsys.readouterr()
    assert "runs/run/model was trained with prompt.system=Think hard." in printed.err
    assert "2 held-out problems" in printed.out
    Path("auto.yaml").write_text("data: math.jsonl\n")
    with pytest.raises(UserError, match="data=FILE"):
        evaluate.main(["recipe=auto.yaml", "model=runs/run/model"])


# ---------------------------------------------------------------- recipes


def recipe_config(recipe, *arguments):
    return config_of(f"recipe={recipe}", "data=math.jsonl", "evaluation.data=auto", *arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_the_rows_of_the_paper(recipe, in_tmp):
    """They have the settings of the paper and of its predecessor, where these say something."""
    settings = flatten(recipe_config(recipe))
    expected = {
        "prompts_per_step": 64,
        "group_size": 8,
        "steps": 117,
        "max_new_tokens": 3072,
        "temperature": 1.0,
        "selection.fraction": 0.05,
        "selection.strategy": "scope",
        "reward": "accuracy",
        "objective": "grpo",
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 0.1,
        "gradient_checkpointing": True,
    }
    assert {key: settings[key] for key in expected} == expected
    small = "1.5b" in recipe.stem or "3b" in recipe.stem
    assert settings["optimizer.lr"] == (3e-6 if small else 1e-6)
    assert settings["model"].rpartition("/")[2].lower() == recipe.stem
    for argument in ("selection.strategy=none", "reward=self_certainty"):
        train.check_methods(recipe_config(recipe, argument))


# The shapes on the hub: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied.
SHAPES = {
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-math-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b-instruct": (4096, 14336, 32, 32, 8, 128256, False),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_cards_that_they_name(recipe, in_tmp):
    """The figures in a recipe and in the pages are the dry run's, and at most 72 GB on 4 ranks."""
    hidden, inner, layers, heads, key_heads, vocabulary, tied = SHAPES[recipe.stem]
    shape = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )
    parameters = sum(p.numel() for p in models.blank(shape).parameters())

    def needed(ranks, prompt, *arguments):
        parts = memory.estimate(
            shape,
            parameters,
            recipe_config(recipe, *arguments),
            precision="bf16",
            ranks=ranks,
            prompt=prompt,
            reference=True,
            all_selected=False,
        )
        return parts["total"] / 1e9

    text = recipe.read_text()
    match = re.search(r"(\d+) GB on each of 4 ranks .* up to (\d+) tokens", text)
    on_four, prompt = map(int, match.groups())
    assert round(needed(4, prompt)) == on_four <= 72
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "real-models.md").read_text()
    assert re.search(rf"recipes/{recipe.stem}\.yaml.*\b{on_four}\b", pages)
    one_card = re.search(r"# One (\d+) GB card: nproc_per_node=1 (.*), (\d+) GB", text)
    if one_card:
        on_one = round(needed(1, prompt, *one_card[2].split()))
        assert on_one == int(one_card[3]) < int(one_card[1])
