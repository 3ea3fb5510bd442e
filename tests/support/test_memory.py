"""The dry run for several ranks, and its memory against the live tensors of real updates."""

import copy
import weakref

import pytest
import torch
from helpers import ALONE, Bf16World, config_of, run_of, write_jsonl
from mathematics import MATH, SMALL, folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import train
from rollout import Rollout, sample
from support import memory, models
from support.optimizer import MasterAdamW


def test_a_dry_run_for_four_ranks_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "math.jsonl", MATH)
    model = folder(tmp_path / "model", "llama", chat=True, weights=False)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    arguments = [f"model={model}", "data=math.jsonl", "validation_fraction=0.3", "dry_run=true"]
    train.main([*SMALL, *arguments])
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in models.load_blank(model)[0].parameters())
    for words in (
        f"{parameters:,} parameters",
        "<|begin_of_text|><|start_header_id|>user",
        "'<|end_of_text|>'",
        "'<|eot_id|>'",
        "4 problems x 4 = 16 completions of up to 12 tokens, 4 of them on each of 4 rank(s)",
        "2 steps = ",
        "KV cache",
        "optimizer",
        "reference",
        "data=math.jsonl",
    ):
        assert words in printed
    assert sorted(tmp_path.rglob("*")) == before


def estimate(*arguments, precision="bf16", reference=True):
    return memory.estimate(
        LlamaConfig(num_hidden_layers=2),
        10**9,
        config_of(*arguments),
        precision=precision,
        ranks=4,
        prompt=20,
        reference=reference,
        all_selected=False,
    )


def test_what_each_rank_keeps():
    def kept(*arguments, **named):
        parts = estimate(*arguments, **named)
        return [parts[name] for name in ("weights", "gradients", "optimizer", "reference")]

    projection = 32_000 * 4096
    assert kept(precision="fp32") == [4e9, 4e9, 2e9, 4e9]
    assert kept() == [2e9, 2e9, 3e9, 2e9]  # two moments and masters, of a quarter
    assert kept("offload=true") == [2e9, 2e9, 0, 2 * projection]
    assert kept(reference=False) == [2e9, 2e9, 3e9, 0]
    by_tokens = estimate("micro_batch_tokens=1000", "max_new_tokens=480")  # two completions at once
    assert by_tokens["update"] == estimate("micro_batch_size=2", "max_new_tokens=480")["update"]


class LiveTensors(TorchDispatchMode):
    """Measures the peak bytes of the storages that operations make, without those of `known`."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


def make_policy(family, precision, vocabulary):
    torch.manual_seed(0)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    policy = model_class(
        config_class(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=family == "qwen2",
            eos_token_id=0,
            bos_token_id=None,
        )
    )
    models.use_fp32_logits(policy.train())
    for parameter in policy.parameters():
        if precision == "bf16":
            parameter.data = parameter.data.bfloat16()
        parameter.grad = torch.zeros_like(parameter)
    return policy


def make_rollout(prompts, length, vocabulary):
    """Make completions of random tokens, all of one length, with rewards that differ in pairs."""
    shape = (len(prompts), length)
    logprobs = torch.log(torch.rand(shape) * 0.9 + 0.05)
    return Rollout(
        prompts,
        torch.randint(1, vocabulary, shape),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(len(prompts), dtype=torch.bool),
        logprobs,
        entropy=-logprobs,
        self_certainty=-logprobs,
        entropy_baseline=-logprobs,
        correct=torch.arange(len(prompts)) % 2 == 0,
        advantages=1.0 - torch.arange(len(prompts)) % 2 * 2,
    )


@pytest.mark.parametrize(
    "family, checkpointing, chunk, strategy, precision, vocabulary",
    [
        ("qwen2", True, 256, "scope", "bf16", 4000),
        ("qwen2", False, 256, "none", "bf16", 4000),
        ("llama", False, 4096, "all", "bf16", 4000),
        ("qwen2", True, 256, "scope", "fp32", 4000),
        ("llama", False, 4096, "all", "fp32", 4000),
        ("qwen2", True, 64, "scope", "bf16", 500),
    ],
)
def test_memory_against_live_tensors(family, checkpointing, chunk, strategy, precision, vocabulary):
    """Of an update and a rollout: what weights, gradients and state do not take, within a tenth."""
    policy = make_policy(family, precision, vocabulary)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    world = Bf16World() if precision == "fp32" else ALONE
    config = config_of(
        "micro_batch_size=8",
        "prompts_per_step=8",
        "group_size=2",
        "max_new_tokens=60",
        f"logits_chunk={chunk}",
        f"gradient_checkpointing={checkpointing}",
        "rollout.batch_size=8",
        f"selection.strategy={strategy}",
    )
    rollout = make_rollout([[1 + i // 2] * 20 for i in range(16)], 60, vocabulary)
    rollout.selected, rollout.token_mask, _ = train.select(rollout, rollout, config, world, seed=0)
    optimizer = MasterAdamW(policy.named_parameters(), world, lr=0.0, weight_decay=0.0)
    run = run_of(policy, config, world=world, reference=reference, optimizer=optimizer)
    state = [x for tensors in optimizer.state.values() for x in tensors.values()]
    known = [*policy.parameters(), *reference.parameters(), *policy.buffers(), *reference.buffers()]
    known += [*state, *(parameter.grad for parameter in policy.parameters())]
    with LiveTensors(known) as updating:
        train.update(run, rollout, on_policy=True)
    settings = {"stop": [0], "max_new_tokens": 60, "seed": 0, "step": 0, "batch_size": 8}
    with LiveTensors(known) as sampling, world.autocast():
        sample(policy, rollout.prompts[:8], list(range(8)), **settings)

    parts = memory.estimate(
        policy.config,
        sum(p.numel() for p in policy.parameters()),
        config,
        precision=precision,
        ranks=1,
        prompt=20,
        reference=strategy != "none",
        all_selected=strategy == "all",
    )
    assert parts["weights"] == sum(p.nbytes for p in policy.parameters())
    assert parts["optimizer"] == sum(x.nbytes for x in state)
    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    assert parts["update"] - fixed == pytest.approx(updating.peak, rel=0.1)
    assert parts["sampling"] - fixed == pytest.approx(sampling.peak, rel=0.1)
    assert parts["total"] == max(parts["update"], parts["sampling"])
