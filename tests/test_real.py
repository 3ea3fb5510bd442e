"""Models from HF folders on problems of mathematics: whole runs, recipes, the dry run and its memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT
from mathematics import GSM8K, MATH, SMALL, folder, tokenizer, write
from transformers import Qwen2Config

import data
import evaluate
import rollout
import train
from support import config as configs
from support import memory, models

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gsm8k.jsonl", GSM8K)
    write(tmp_path / "math.jsonl", MATH)
    return tmp_path


@pytest.mark.parametrize("architecture, chat, file", [("qwen2", True, "math"), ("qwen2", False, "gsm8k"),
                                                      ("llama", True, "gsm8k"), ("qwen3", False, "math")])
def test_a_run_on_mathematics(in_tmp, capsys, architecture, chat, file):
    """A random model solves nothing, but is sure of itself here and there: RLIF."""
    model = folder(in_tmp / architecture, architecture, chat=chat)
    train.main(configs.training_keys([*SMALL, f"model={model}", f"data={file}.jsonl", "name=run", "data.validation=0.3",
                                      "gradient_checkpointing=true", "reward=self_certainty"]))
    rows = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    vocabulary = len(tokenizer("llama" if architecture == "llama" else "qwen", chat=chat))
    for row in rows[1:3]:
        assert 0.9 * np.log(vocabulary) < row["entropy"] < np.log(vocabulary) and row["logprob_drift"] < 1e-4
        assert row["length/mean"] <= 12 and row["grad_norm"] > 0 and 0 < row["selection/fraction"] <= 0.31
    printed = capsys.readouterr().out
    problem = (GSM8K[0]["question"] if file == "gsm8k" else "Find the root of $")[:20]
    assert "first prompt" in printed and problem in printed and "stop ids" in printed
    assert ("<|im_start|>user" in printed or "<|start_header_id|>user" in printed) == chat
    if (architecture, chat) == ("qwen2", True):
        anyone_can_load(in_tmp / "runs" / "run" / "model")


ANYONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
text = sys.argv[2]
ids = tokenizer(text).input_ids
assert tokenizer.decode(ids) == text, (text, tokenizer.decode(ids))
out = pipeline("text-generation", model=folder, max_new_tokens=4)(text)
assert out[0]["generated_text"].startswith(text), out
stop = model.generation_config.eos_token_id
for wanted in stop:  # a model that can draw nothing else
    model.get_output_embeddings().weight.data.zero_()
    model.get_output_embeddings().bias = None
    head, only = model.lm_head.forward, torch.tensor([wanted])
    model.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, only, 9)
    assert model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4).shape[1] == len(ids) + 1
    model.lm_head.forward = head
ours = {"step", "rollout", "toy", "data", "support", "train"}
assert not ours & set(sys.modules)
print(json.dumps(sorted(stop)))
"""


def anyone_can_load(saved):
    """By transformers alone: text goes round, `pipeline` works, and `generate` stops where training did."""
    done = subprocess.run([sys.executable, "-c", ANYONE, saved, "Find the root of $x"], cwd=saved, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    words = tokenizer("qwen", chat=True)
    assert json.loads(done.stdout) == sorted(words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    head, _, rest = (saved / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    assert "self_certainty" in rest and "pass@4" in rest and "±" in rest and "math.jsonl" in rest


def test_verifiable_rewards_reach_the_update(in_tmp, monkeypatch):
    """The real grader on real text: where every second completion boxes the gold answer, every group teaches."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    answers = {data.math_problem(row, "auto", "auto")["answer"] for row in MATH}
    drawn = iter(range(10**6))
    monkeypatch.setattr(rollout, "decode", lambda words, sampled: [
        rf"\boxed{{{sorted(answers)[0]}}}" if next(drawn) % 2 else r"\boxed{-1}" for _ in sampled.prompts])
    only = [row for row in MATH if data.math_problem(row, "auto", "auto")["answer"] == sorted(answers)[0]]
    write(in_tmp / "one.jsonl", [{**only[0], "problem": f"{only[0]['problem']} ({i})"} for i in range(20)])
    monkeypatch.setattr(models, "stop_ids", lambda model, words: list(range(len(words))))  # none is truncated
    train.main(configs.training_keys([*SMALL, f"model={model}", "data=one.jsonl", "name=run", "data.validation=0.3"]))
    rows = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/mean"] == 0.5 and row["group/frac_zero_std"] == 0 for row in rows[1:3])


def test_evaluation_asks_as_training_did(in_tmp, capsys):
    """recipe=runs/x/config.yaml brings the run's prompt; another prompt is told."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    train.main(configs.training_keys([*SMALL, f"model={model}", "data=math.jsonl", "name=run",
                                      "prompt.system=Think hard.",
                                      "evaluation.data=gsm8k.jsonl", "steps=1"]))
    run = ["recipe=runs/run/config.yaml", "model=runs/run/model", "samples=2", "problems=2"]
    keys = configs.evaluation_keys(run)
    expected = {"prompt.system": "Think hard.", "data.file": "gsm8k.jsonl", "max_new_tokens": 12}
    assert {key: keys[key] for key in expected} == expected
    capsys.readouterr()
    evaluate.main(keys)
    assert "trained with" not in capsys.readouterr().err
    evaluate.main(configs.evaluation_keys([*run, "prompt.system=", "reward.grader=math_verify"]))
    told = capsys.readouterr()
    assert "runs/run/model was trained with prompt.system=Think hard." in told.err and "2 held-out problems" in told.out
    with pytest.raises(configs.UserError, match="data=FILE"):
        Path("auto.yaml").write_text("data: math.jsonl\n")
        configs.evaluation_keys(["recipe=auto.yaml", "model=runs/run/model"])


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_the_papers_rows(recipe, in_tmp):
    """METHODS of the paper and its predecessor, where they say something."""
    keys = configs.training_keys([f"recipe={recipe}", "data=math.jsonl", "evaluation.data=auto"])
    given = {"prompts_per_step": 64, "group_size": 8, "steps": 117, "max_new_tokens": 3072, "temperature": 1.0,
             "selection.fraction": 0.05, "selection.strategy": "scope", "reward.kind": "accuracy", "objective": "grpo",
             "optimizer.schedule": "cosine", "optimizer.warmup": 0.1,
             "gradient_checkpointing": True}
    assert {key: keys[key] for key in given} == given
    assert keys["optimizer.lr"] == (3e-6 if "1.5b" in recipe.stem or "3b" in recipe.stem else 1e-6)
    assert keys["model"].rpartition("/")[2].lower() == recipe.stem
    for words in (["selection.strategy=none"], ["reward=self_certainty"], ["selection.strategy=uniform"]):
        configs.training_keys([f"recipe={recipe}", "data=math.jsonl", "evaluation.data=auto", *words])


SHAPES = {  # of the hub: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True), "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False), "qwen2.5-math-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b-instruct": (4096, 14336, 32, 32, 8, 128256, False)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_cards_that_they_name(recipe, in_tmp):
    """The figures in a recipe and in docs/ are the dry run's, and at most 72 GB on 4 ranks."""
    hidden, inner, layers, heads, pairs, vocabulary, tied = SHAPES[recipe.stem]
    shape = Qwen2Config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
                        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=tied)
    parameters = sum(p.numel() for p in models.blank(shape).parameters())
    text = recipe.read_text()

    def needed(ranks, prompt, *words):
        keys = configs.training_keys([f"recipe={recipe}", "data=math.jsonl", "evaluation.data=auto", *words])
        config = configs.namespace(configs.nest(keys))
        return memory.estimate(shape, parameters, config, precision="bf16", ranks=ranks, prompt=prompt,
                               reference=True, all_selected=False)["total"] / 1e9

    on_four, prompt = map(int, re.search(r"(\d+) GB on each of 4 ranks .* up to (\d+) tokens", text).groups())
    assert on_four <= 72 and round(needed(4, prompt)) == on_four
    assert f"`recipes/{recipe.name}` | {yaml.safe_load(text)['model']} | {on_four} |" in (
        recipe.parents[1] / "docs" / "real-models.md").read_text()
    if alone := re.search(r"# One (\d+) GB card: nproc_per_node=1 (.*), (\d+) GB", text):
        assert round(needed(1, prompt, *alone[2].split())) == int(alone[3]) < int(alone[1])


def test_recipes_lie_between_the_defaults_and_the_command_line(in_tmp):
    Path("mine.yaml").write_text("data: math.jsonl\nsteps: 7\noptimizer: {lr: 1}\nreward: {kind: self_certainty}\n")
    keys = configs.training_keys(["recipe=mine.yaml", "steps=9"])
    assert (keys["data.file"], keys["steps"], keys["optimizer.lr"], keys["reward.kind"]) == (
        "math.jsonl", 9, 1.0, "self_certainty")
    for text, words in (("stebs: 3", "stebs"), ("steps: many", "steps=many: needs a whole number"),
                        ("- 3", "YAML file of keys"),
                        ("steps: [", "cannot be read"), ("optimizer: {lr: fast}", "a number")):
        Path("bad.yaml").write_text(text + "\n")
        with pytest.raises(configs.UserError, match=f"recipe=bad.yaml.*{words}"):
            configs.training_keys(["recipe=bad.yaml"])


def test_stored_settings_of_a_run_are_a_recipe(in_tmp):
    keys = configs.training_keys(["data=math.jsonl", "reward=token_entropy", "name=a"])
    Path("config.yaml").write_text(yaml.safe_dump(configs.nest(keys)))
    assert configs.training_keys(["recipe=config.yaml"]) == keys | {"recipe": "config.yaml"}
