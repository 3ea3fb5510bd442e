"""The dry run, and its memory against the live tensors of real updates and rollouts."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from helpers import config_of
from mathematics import MATH, SMALL, folder, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rollout
import step as steps
import train
from support import config as configs
from support import distributed, memory, models
from support.optimizer import MasterAdamW


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "math.jsonl", MATH)
    return tmp_path


def test_a_dry_run_needs_no_weights_and_writes_nothing(in_tmp, monkeypatch, capsys):
    """For four ranks that are not there."""
    model = folder(in_tmp / "model", "llama", chat=True, weights=False)
    before = sorted(in_tmp.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    train.main(configs.training_keys([*SMALL, f"model={model}", "data=math.jsonl", "dry_run=true",
                                      "data.validation=0.3"]))
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig.from_pretrained(model)).parameters())
    for words in (f"LlamaForCausalLM, {parameters:,} parameters", "<|begin_of_text|><|start_header_id|>user",
                  "'<|end_of_text|>'", "'<|eot_id|>'", "4 prompts x 4 = 16 completions of up to 12 tokens",
                  "4 rank(s) 4 compl",
                  "steps and", "steps = ", "KV cache", "optimizer", "reference", "data.file: math.jsonl"):
        assert words in printed, words
    assert sorted(in_tmp.rglob("*")) == before


def estimate(*words, precision="bf16", **changes):
    known = {"ranks": 4, "prompt": 20, "reference": True, "all_selected": False} | changes
    return memory.estimate(LlamaConfig(num_hidden_layers=2), 10**9, config_of(*words), precision=precision, **known)


def test_what_each_rank_keeps():
    parts = ("weights", "gradients", "optimizer", "reference")
    head = 32_000 * 4096
    assert [estimate(precision="fp32")[part] for part in parts] == [4e9, 4e9, 2e9, 4e9]
    assert [estimate()[part] for part in parts] == [2e9, 2e9, 3e9, 2e9]  # two moments and masters, of a quarter
    assert [estimate("offload=true")[part] for part in parts] == [2e9, 2e9, 0, 2 * head]
    assert estimate(reference=False)["reference"] == 0
    budget = estimate("micro_batch_tokens=1000", "max_new_tokens=480")  # two completions at once
    assert budget["update"] == estimate("micro_batch_size=2", "max_new_tokens=480")["update"]


def test_a_dry_run_of_the_toy(in_tmp, capsys):
    train.main(configs.training_keys(["dry_run=true", "resume=true", "name=none"]))  # resume has no say in it
    printed = capsys.readouterr().out
    assert "32 prompts x 8 = 256 completions" in printed and "315,936 parameters" in printed
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
    "family, checkpointing, chunk, strategy, precision",
    [("qwen2", True, 256, "scope", "bf16"), ("qwen2", False, 256, "none", "bf16"),
     ("llama", True, 128, "scope", "bf16"), ("llama", False, 4096, "all", "bf16"),
     ("qwen2", True, 256, "scope", "fp32"), ("llama", False, 4096, "all", "fp32")],
)
def test_memory_against_live_tensors(family, checkpointing, chunk, strategy, precision):
    """Of a real update and rollout: what comes on top of weights, gradients and optimizer within a tenth."""
    torch.manual_seed(0)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM),
                                 "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    shape = config_class(vocab_size=4000, hidden_size=256, intermediate_size=1024, num_hidden_layers=3,
                         num_attention_heads=8,
                         num_key_value_heads=2, tie_word_embeddings=family == "qwen2", eos_token_id=0,
                         bos_token_id=None)
    policy = model_class(shape).train()
    models.fp32_logits(policy)
    if checkpointing:
        models.recompute_layers(policy)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    world = distributed.World(0, 1, torch.device("cpu"), precision)
    if precision == "fp32":
        world.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        policy.bfloat16()
        reference.bfloat16()
    config = config_of(
        "micro_batch_size=8", "prompts_per_step=8", "group_size=2", "max_new_tokens=60", f"logits_chunk={chunk}",
        f"gradient_checkpointing={str(checkpointing).lower()}", "rollout.batch_size=8",
        f"selection.strategy={strategy}")
    prompts = [[1] * 20] * 16
    sampled = rollout.from_completions(prompts, [torch.randint(1, 4000, (60,)).tolist() for _ in prompts], "cpu")
    sampled.logprobs = torch.log(torch.rand(sampled.mask.shape) * 0.9 + 0.05)
    advantages = torch.tensor([1.0, -1.0] * 8)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, 0)
    optimizer = MasterAdamW(policy.named_parameters(), lr=0.0, weight_decay=0.0)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = [tensor for kept in optimizer.state.values() for tensor in kept.values()]
    known = [*policy.parameters(), *reference.parameters(), *policy.buffers(), *reference.buffers(), *state,
             *(parameter.grad for parameter in policy.parameters())]
    with Live(known) as update:
        batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, reference, config, world)
        loss = steps.MicroBatchLoss(policy, config, 1)
        steps.update(loss, optimizer, batches, selection, on_policy=True, world=world, max_grad_norm=1.0)
    with Live(known) as sampling, world.autocast():
        rollout.sample(policy, prompts[:8], list(range(8)), stop=[0], max_new_tokens=60, seed=0, step=0, batch_size=8)

    parameters = sum(p.numel() for p in policy.parameters())
    parts = memory.estimate(shape, parameters, config, precision=precision, ranks=1, prompt=20,
                            reference=strategy != "none", all_selected=strategy == "all")
    assert parts["weights"] == sum(p.nbytes for p in policy.parameters())
    assert parts["optimizer"] == sum(tensor.nbytes for tensor in state)
    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    assert parts["update"] - fixed == pytest.approx(update.peak, rel=0.1)
    assert parts["sampling"] - fixed == pytest.approx(sampling.peak, rel=0.1)


