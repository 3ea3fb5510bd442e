"""HF `generate` as a part: completions in the making side by side, their KV cache, and a config that hides nothing."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer


@contextmanager
def sampling_mode(model):
    """`eval()`, no gradients, and a blank generation_config; all restored afterwards.

    Left in place, the model's own generation_config fills every field that ours leaves unset (a
    repetition penalty, suppressed tokens ...), and the sampled distribution is no longer the scored one.
    """
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()  # also: in train mode gradient checkpointing switches the KV cache off
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


@dataclass
class Batch:
    """b completions in the making, side by side: all that `generate` needs to go on. Columns end together."""

    rows: Tensor  # [b] which of the prompts
    drawn: Tensor  # [b] tokens drawn so far
    ids: Tensor  # [b, L] prompts and draws, padded on the left
    attention: Tensor  # [b, L], 0 at the padding
    cache: DynamicCache  # of all columns but the last, which `generate` takes next

    @property
    def may_grow(self) -> bool:
        """A sliding window's layers hold the last columns only, and cannot be padded."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def joined(self, other: "Batch") -> "Batch":
        """Both, the narrower one padded on the left."""
        width = max(self.ids.shape[1], other.ids.shape[1])

        def both(a: Tensor, b: Tensor, dim: int, size: int) -> Tensor:
            """a and b one below the other, `size` long in dimension `dim`, counted from the last."""
            return torch.cat([functional.pad(x, [0, 0] * (-1 - dim) + [size - x.shape[dim], 0]) for x in (a, b)])

        for own, others in zip(self.cache.layers, other.cache.layers):
            own.keys, own.values = (both(own.keys, others.keys, -2, width - 1),
                                    both(own.values, others.values, -2, width - 1))
        return Batch(torch.cat([self.rows, other.rows]), torch.cat([self.drawn, other.drawn]),
                     both(self.ids, other.ids, -1, width), both(self.attention, other.attention, -1, width), self.cache)

    def after(self, sequences: Tensor, count: int, going: Tensor) -> "Batch | None":
        """`count` draws later, of the rows that go on [b] bool, without columns that are padding in all of them."""
        if not going.any():
            return None
        kept = going.nonzero().squeeze(1)
        attention = torch.cat([self.attention[kept], self.attention.new_ones(len(kept), count)], dim=1)
        unused = int(attention.argmax(dim=1).min())
        if len(kept) < len(going):
            self.cache.batch_select_indices(kept)
        if unused and self.may_grow:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]
        else:
            unused = 0
        return Batch(self.rows[kept], self.drawn[kept] + count, sequences[kept, unused:], attention[:, unused:],
                     self.cache)


def begin(model, prompts: list[list[int]], rows: range) -> Batch:
    """The rows before their first draw; each distinct prompt goes through the model once, whatever its group's size."""
    device = next(model.parameters()).device
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(prompts[row]) for row in rows))}
    ids, attention = pad_left([list(prompt) for prompt in distinct], device)
    cache = DynamicCache(config=model.config)
    model.base_model(ids[:, :-1], attention_mask=attention[:, :-1], past_key_values=cache, use_cache=True,
                     position_ids=(attention[:, :-1].cumsum(dim=1) - 1).clamp(min=0))
    copies = torch.tensor([distinct[tuple(prompts[row])] for row in rows], device=device)
    cache.batch_select_indices(copies)
    numbers = torch.tensor(list(rows), device=device)
    return Batch(numbers, torch.zeros_like(numbers), ids[copies], attention[copies], cache)


def generation_config(max_new_tokens: int, stop: list[int]) -> GenerationConfig:
    """Greedy, for StatelessSampler has drawn the token already: temperature, top-p and top-k never act.

    What `generate` would still do to the logits before that is switched off by name.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],  # only what `generate` writes after a finished row; never read
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        return_dict_in_generate=True,
    )


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Prompts side by side, padded on the left so that all end together: ids and attention mask [B, P], P >= 2."""
    width = max(2, *map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention
