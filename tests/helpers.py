"""What several tests share: tiny random models that stand in for real ones, configs, and one rank alone."""

import json
import math
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import step as steps
from support import config as configs
from support.distributed import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
VOCABULARY = 40
# A run of the toy of a few weights, in a second.
SMALL = ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=3", "toy.batch=8",
         "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "evaluation.problems=3", "evaluation.samples=4",
         "evaluation.samples_between=2", "evaluation.every=2", "log_every=1", "save_every=2", "steps=4",
         "countdown_problems=50", "selection.fraction=0.3", "optimizer.lr=0.01"]


def tiny_model(architecture: str = "qwen2", *, seed: int = 0, spread: float = 1.5, **changes):
    """A random 2-layer model; `spread` scales the embeddings, so that its distributions are not flat."""
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM),
                                 "llama": (LlamaConfig, LlamaForCausalLM),
                                 "mistral": (MistralConfig, MistralForCausalLM)}[architecture]
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1,
                 pad_token_id=0, bos_token_id=None, tie_word_embeddings=architecture == "qwen2")
    model = model_class(config_class(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread * 3)
    return model.eval()


def config_of(*arguments):
    """The defaults with `key=value` words, as attributes."""
    return configs.namespace(configs.nest(configs.override(configs.read_defaults(), list(arguments))))


def roll_out(policy, tokenizer, stop, problems, step, config, world=ALONE):
    """Steps 1-3 of train.py: the rollout, its texts, rewards and verdicts."""
    run = steps.Run(config, world, policy, tokenizer, stop, problems)
    asked, rows = steps.draw_problems(run, step)
    sampled = steps.sample(run, asked, rows, step)
    rewards, correct, texts = steps.reward(run, asked, sampled)
    return sampled, texts, rewards, correct


def metrics_of(name: str) -> list[dict]:
    """The lines of a run's metrics.jsonl without what differs between two equal runs."""
    rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "mem_gb"} for row in rows]


def assert_same_gradient(a, b, tolerance=1e-6):
    """Relative to the size of the whole gradient."""
    size = math.sqrt(sum(g.double().pow(2).sum().item() for g in a.values()))
    difference = math.sqrt(sum((a[name].double() - b[name].double()).pow(2).sum().item() for name in a))
    assert size > 1e-3 and difference <= tolerance * size, difference / size
