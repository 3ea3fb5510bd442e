"""Shared fixtures: tiny random models that stand in for real ones. Everything runs on CPU, offline."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 40

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


def tiny_model(architecture: str = "qwen2", *, seed: int = 0, spread: float = 1.5, **changes):
    """A random 2-layer model; `spread` scales the embeddings, so that its distributions are not flat."""
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        architecture
    ]
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1,
                 pad_token_id=0, bos_token_id=None, tie_word_embeddings=architecture == "qwen2")  # fmt: skip
    model = model_class(config_class(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread * 3)
    return model.eval()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def prompts():
    """Twelve prompts of unequal lengths, token ids from 2 up."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCABULARY, (3 + i % 5,), generator=generator).tolist() for i in range(12)]
