"""Models from HF folders on problems of mathematics: whole runs, recipes, the dry run and its memory."""

import copy
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mathematics import GSM8K, MATH, folder, tokenizer, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import config as configs
import data
import distributed
import dry_run
import evaluate
import rollout
import step as steps
import train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["prompts_per_step=4", "group_size=4", "max_new_tokens=12", "steps=2", "evaluation.problems=3",
         "optimizer.lr=0.001",
         "evaluation.samples=4", "evaluation.every=0", "selection.fraction=0.3", "log_every=1"]  # fmt: skip


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gsm8k.jsonl", GSM8K)
    write(tmp_path / "math.jsonl", MATH)
    return tmp_path


@pytest.mark.parametrize("architecture, chat, file", [("qwen2", True, "math"), ("qwen2", False, "gsm8k"),
                                                      ("llama", True, "gsm8k"), ("qwen3", False, "math")])  # fmt: skip
def test_a_run_on_mathematics(in_tmp, capsys, architecture, chat, file):
    """A random model solves nothing, but is sure of itself here and there: RLIF."""
    model = folder(in_tmp / architecture, architecture, chat=chat)
    train.main(configs.training_keys([*SMALL, f"model={model}", f"data={file}.jsonl", "name=run", "data.validation=0.3",
                                      "gradient_checkpointing=true", "reward=self_certainty"]))  # fmt: skip
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


def test_verifiable_rewards_reach_the_update(in_tmp, monkeypatch):
    """The real grader on real text: where every second completion boxes the gold answer, every group teaches."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    answers = {data.math_problem(row, "auto", "auto")["answer"] for row in MATH}
    drawn = iter(range(10**6))
    monkeypatch.setattr(rollout, "decode", lambda words, sampled: [
        rf"\boxed{{{sorted(answers)[0]}}}" if next(drawn) % 2 else r"\boxed{-1}" for _ in sampled.prompts])  # fmt: skip
    only = [row for row in MATH if data.math_problem(row, "auto", "auto")["answer"] == sorted(answers)[0]]
    write(in_tmp / "one.jsonl", [{**only[0], "problem": f"{only[0]['problem']} ({i})"} for i in range(20)])
    monkeypatch.setattr(rollout, "stop_ids", lambda model, words: list(range(len(words))))  # none is truncated
    train.main(configs.training_keys([*SMALL, f"model={model}", "data=one.jsonl", "name=run", "data.validation=0.3"]))
    rows = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/mean"] == 0.5 and row["group/frac_zero_std"] == 0 for row in rows[1:3])


def test_evaluation_asks_as_training_did(in_tmp, capsys):
    """recipe=runs/x/config.yaml brings the run's prompt; another prompt is told."""
    model = folder(in_tmp / "model", "qwen2", chat=True)
    train.main(configs.training_keys([*SMALL, f"model={model}", "data=math.jsonl", "name=run",
                                      "prompt.system=Think hard.",
                                      "evaluation.data=gsm8k.jsonl", "steps=1"]))  # fmt: skip
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
             "grpo.kl_coef": 0.0, "optimizer.schedule": "cosine", "optimizer.warmup": 0.1,
             "gradient_checkpointing": True}  # fmt: skip
    assert {key: keys[key] for key in given} == given
    assert keys["optimizer.lr"] == (3e-6 if "1.5b" in recipe.stem or "3b" in recipe.stem else 1e-6)
    assert keys["model"].rpartition("/")[2].lower() == recipe.stem
    for words in (["selection.strategy=none"], ["reward=self_certainty"], ["selection.strategy=uniform"]):
        configs.training_keys([f"recipe={recipe}", "data=math.jsonl", "evaluation.data=auto", *words])


def test_recipes_lie_between_the_defaults_and_the_command_line(in_tmp):
    Path("mine.yaml").write_text("data: math.jsonl\nsteps: 7\noptimizer: {lr: 1}\nreward: {kind: self_certainty}\n")
    keys = configs.training_keys(["recipe=mine.yaml", "steps=9"])
    assert (keys["data.file"], keys["steps"], keys["optimizer.lr"], keys["reward.kind"]) == (
        "math.jsonl", 9, 1.0, "self_certainty")  # fmt: skip
    for text, words in (("stebs: 3", "stebs"), ("steps: many", "steps=many: needs a whole number"),
                        ("- 3", "YAML file of keys"),
                        ("steps: [", "cannot be read"), ("optimizer: {lr: 1e-6}", "1.0e-6")):  # fmt: skip
        Path("bad.yaml").write_text(text + "\n")
        with pytest.raises(configs.UserError, match=f"recipe=bad.yaml.*{words}"):
            configs.training_keys(["recipe=bad.yaml"])


# ---------------------------------------------------------------- the dry run


def test_a_dry_run_needs_no_weights_and_writes_nothing(in_tmp):
    """As a command, for four ranks that are not there."""
    model = folder(in_tmp / "model", "llama", chat=True, weights=False)
    before = sorted(in_tmp.rglob("*"))
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *SMALL, f"model={model}", "data=math.jsonl", "dry_run=true",
         "data.validation=0.3"],
        capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": "4", "RANK": "0"}, timeout=100)  # fmt: skip
    assert result.returncode == 0, result.stderr
    parameters = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig.from_pretrained(model)).parameters())
    for words in (f"LlamaForCausalLM, {parameters:,} parameters", "<|begin_of_text|><|start_header_id|>user",
                  "'<|end_of_text|>'", "'<|eot_id|>'", "4 prompts x 4 = 16 completions of up to 12 tokens",
                  "4 rank(s) 4 compl",
                  "steps and", "steps = ", "KV cache", "optimizer", "reference", "data.file: math.jsonl"):  # fmt: skip
        assert words in result.stdout, words
    assert sorted(in_tmp.rglob("*")) == before


def test_a_dry_run_of_the_toy(in_tmp, capsys):
    train.main(configs.training_keys(["dry_run=true"]))
    printed = capsys.readouterr().out
    assert "64 prompts x 8 = 512 completions" in printed and "753,024 parameters" in printed
    assert not Path("runs").exists()


class Live(TorchDispatchMode):
    """Counts the bytes of storages that live, and their peak, from the first operation on; not `known` ones."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


@pytest.mark.parametrize(
    "family, checkpointing, chunk, strategy",
    [("qwen2", True, 256, "scope"), ("qwen2", False, 256, "scope"), ("llama", True, 128, "scope"),
     ("llama", False, 4096, "all"), ("qwen2", True, 4096, "none")],
)  # fmt: skip
def test_memory_against_the_live_tensors_of_a_real_update_and_rollout(family, checkpointing, chunk, strategy):
    """In bf16 autocast, as on a GPU: what comes on top of weights, gradients and optimizer within a fifth."""
    torch.manual_seed(0)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM),
                                 "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    shape = config_class(vocab_size=8000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                         num_attention_heads=8,
                         num_key_value_heads=2, tie_word_embeddings=family == "qwen2", eos_token_id=0,
                         bos_token_id=None)  # fmt: skip
    policy = model_class(shape).train()
    if checkpointing:
        rollout.recompute_layers(policy)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    world = distributed.World(0, 1, torch.device("cpu"))
    world.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    keys = configs.override(configs.read_defaults(), [
        "micro_batch_size=8", "prompts_per_step=8", "group_size=2", "max_new_tokens=100", f"logits_chunk={chunk}",
        f"gradient_checkpointing={str(checkpointing).lower()}", "rollout.batch_size=8",
        f"selection.strategy={strategy}"])  # fmt: skip
    config = configs.namespace(configs.nest(keys))
    prompts = [[1] * 20] * 16
    sampled = rollout.from_completions(prompts, [torch.randint(1, 8000, (100,)).tolist() for _ in prompts], "cpu")
    sampled.logprobs = torch.log(torch.rand(sampled.mask.shape) * 0.9 + 0.05)
    advantages = torch.tensor([1.0, -1.0] * 8)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, 0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.zero_grad = lambda set_to_none: None  # the gradients are counted as there already
    known = [*policy.parameters(), *reference.parameters(), *policy.buffers(), *reference.buffers(),
             *(parameter.grad for parameter in policy.parameters())]  # fmt: skip
    with Live(known) as update:
        batches = steps.micro_batches(sampled, advantages, advantages > 0, selection, reference, config, world)
        steps.update(steps.Objective(policy, config, 1), optimizer, batches, selection, on_policy=True, world=world,
                     max_grad_norm=1.0)  # fmt: skip
    with Live(known) as sampling, world.autocast():
        rollout.sample(policy, prompts[:8], list(range(8)), stop=[0], max_new_tokens=100, seed=0, step=0, batch_size=8)

    parameters = sum(p.numel() for p in policy.parameters())
    parts = dry_run.memory(shape, parameters, config, ranks=1, prompt=20)
    assert parts["weights"] == parts["gradients"] == 4 * parameters and parts["optimizer"] == 8 * parameters
    assert parts["reference"] == (0 if strategy == "none" else 4 * parameters)
    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    assert parts["update"] - fixed == pytest.approx(update.peak, rel=0.2)
    assert parts["sampling"] - fixed == pytest.approx(sampling.peak, rel=0.2)


# ---------------------------------------------------------------- architectures

GEMMA = dict(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
             num_attention_heads=4,
             num_key_value_heads=1, eos_token_id=1, bos_token_id=None, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize("model_class, shape", [
    (GemmaForCausalLM, GemmaConfig(**GEMMA)),
    (Gemma3ForCausalLM,
     Gemma3TextConfig(**GEMMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
], ids=["gemma", "gemma3"])  # fmt: skip
def test_gemmas_without_soft_caps_are_right(tmp_path, model_class, shape):
    """Scaled embeddings and sliding windows: recorded log-probabilities are the model's own, row by row."""
    torch.manual_seed(0)
    shape.vocab_size = 400
    made = model_class(shape)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    made.save_pretrained(tmp_path)
    tokenizer("qwen", chat=False).save_pretrained(tmp_path)
    model, _ = rollout.load(str(tmp_path))
    prompts = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    sampled = rollout.sample(model, prompts, [0, 1, 2], stop=[1], max_new_tokens=14, seed=1, step=0, segment=3)
    for row, prompt in enumerate(prompts):
        length = int(sampled.lengths[row])
        ids = torch.tensor([prompt + sampled.tokens[row, :length].tolist()])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), dim=-1)
        own = logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(sampled.logprobs[row, :length], own, rtol=1e-3, atol=1e-4)
    config = configs.namespace(configs.nest(configs.read_defaults()))
    world = distributed.World(0, 1, torch.device("cpu"))
    scored = steps.rescore(model, sampled, config, world)
    torch.testing.assert_close(scored.logprobs, sampled.logprobs, rtol=1e-3, atol=1e-4)


def test_a_gemma_with_a_soft_cap_is_refused_with_one_line(in_tmp):
    Gemma2ForCausalLM(Gemma2Config(**GEMMA | {"vocab_size": 400},
                                   final_logit_softcapping=3.0)).save_pretrained("capped")
    tokenizer("qwen", chat=False).save_pretrained("capped")
    with pytest.raises(configs.UserError, match="^model=./capped post-processes its logits[^\n]*$"):
        train.main(configs.training_keys(["model=./capped", "data=math.jsonl", "prompts_per_step=4"]))
    assert not Path("runs").exists()


def test_a_hub_out_of_reach_is_told_at_once(in_tmp):
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", "model=owner/name", "data=math.jsonl", "prompts_per_step=4"],
        capture_output=True,
        text=True, timeout=60,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(in_tmp / "hf")})  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    for word in ("model=owner/name cannot be loaded", "http://127.0.0.1:1 is out of reach", "local folder"):
        assert word in lines[0]


def test_stored_settings_of_a_run_are_a_recipe(in_tmp):
    keys = configs.training_keys(["data=math.jsonl", "reward=token_entropy", "name=a"])
    Path("config.yaml").write_text(yaml.safe_dump(configs.nest(keys)))
    assert configs.training_keys(["recipe=config.yaml"]) == keys | {"recipe": "config.yaml"}
