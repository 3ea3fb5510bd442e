"""Families of models that docs/questions.md names: loaded, sampled, updated, saved, loaded again; and the dry run."""

import pytest
import torch
import transformers
from helpers import ALONE, config_of
from mathematics import tokenizer
from transformers import AutoModelForCausalLM

import grpo
import rollout
import step as steps
from support import memory, models

USUAL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, tie_word_embeddings=True)
FEWER = USUAL | dict(num_key_value_heads=2)
FAMILIES = {
    "Qwen2": FEWER, "Qwen3": FEWER | {"head_dim": 8}, "Llama": FEWER | {"tie_word_embeddings": False},
    "Mistral": FEWER | {"sliding_window": 6}, "Gemma": FEWER | {"head_dim": 8},
    "Gemma3Text": FEWER | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4), "GPTNeoX": USUAL, "Olmo2": FEWER, "SmolLM3": FEWER,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    words = tokenizer("qwen", chat=False)
    torch.manual_seed(0)
    shape = getattr(transformers, f"{family}Config")(
        vocab_size=len(words), max_position_embeddings=128, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        **FAMILIES[family] if family != "GPT2" else {**FAMILIES[family], "n_positions": 128})
    made = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    made.save_pretrained(tmp_path / "made")
    words.save_pretrained(tmp_path / "made")

    policy, _ = models.load(str(tmp_path / "made"))
    reference, _ = models.load(str(tmp_path / "made"))
    config = config_of("micro_batch_tokens=60", "selection.fraction=0.3", "logits_chunk=7")
    prompts = [[2 + i % 3] * (2 + i % 3) for i in range(12) for _ in range(2)]
    sampled = rollout.sample(policy, prompts, list(range(24)), stop=[1], max_new_tokens=10, seed=0, step=0,
                             batch_size=7, segment=3)
    scored = rollout.rescore(policy, sampled, config, ALONE)
    torch.testing.assert_close(scored.logprobs, sampled.logprobs, rtol=0, atol=2e-4)
    advantages = grpo.group_advantages(torch.arange(24.0) % 5, 2)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=0)
    batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, reference, config, ALONE)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    metrics = steps.update(steps.MicroBatchLoss(policy, config, 1), optimizer, batches, selection, on_policy=True,
                           world=ALONE, max_grad_norm=1.0)
    assert metrics["grad_norm"] > 1e-3 and selection.selected.any()

    policy.save_pretrained(tmp_path / "trained")
    words.save_pretrained(tmp_path / "trained")
    again, _ = models.load(str(tmp_path / "trained"))
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(tokens).logits, policy(tokens).logits)
    assert not torch.allclose(again(tokens).logits, reference(tokens).logits)
    blank, _ = models.load_blank(str(tmp_path / "made"))
    parts = memory.estimate(blank.config, sum(p.numel() for p in blank.parameters()), config, precision="bf16", ranks=1,
                            prompt=4, reference=True, all_selected=False)
    assert parts["weights"] == 2 * sum(p.numel() for p in policy.parameters()) and parts["total"] > 2 * parts["weights"]
