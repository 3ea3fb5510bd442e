"""Rollouts: batched HF `generate`, and the record that the sampler keeps of every draw.

Two habits keep this file exact:

* Sampling is *stateless*. The noise of a draw is a hash of (seed, step, row, position), so a row gets the
  same completion however rows are batched, ordered or spread over ranks, and resuming needs no RNG state.
* Masks come from *positions*: the first stop token ends a completion and belongs to it. No mask compares
  with a pad id, which may well be the stop id.

Shapes: B completions, P padded prompt length, C padded completion length, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

import grpo
from support.models import hidden_states

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's odd constant near 2^64/phi, as a signed 64-bit integer
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: 64 well-stirred bits from 64 (Steele, Lea & Flood 2014). int64, any shape.

    `>>` is arithmetic on signed integers; the masks make it the logical shift that the hash is built on.
    """
    x = (x ^ (x >> 30 & 2**34 - 1)) * MIX_1
    x = (x ^ (x >> 27 & 2**37 - 1)) * MIX_2
    return x ^ (x >> 31 & 2**33 - 1)


def gumbel_noise(seed: int, step: int, rows: Tensor, position: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [B, V], a pure function of (seed, step, row, position). rows [B] int64."""
    key = torch.zeros_like(rows)
    for word in (seed, step, rows, position):
        key = mix(key + word + GOLDEN)
    counter = torch.arange(1, vocabulary + 1, device=rows.device)
    bits = mix(key[:, None] + counter * GOLDEN) >> 32 & 2**32 - 1
    uniform = (bits.float() + 0.5) * 2.0**-32
    # An exponential made as -log(1 - u) keeps fp32's fine steps near 0, which is where winners come from.
    return -torch.log(-torch.log1p(-uniform))


RECORDED = ("logprobs", "entropy", "self_certainty", "collision")


class StatelessSampler(LogitsProcessor):
    """Draws the next token by the Gumbel-max trick and records the draw; `generate` only takes its argmax.

    argmax(z + Gumbel noise) is an exact sample of softmax(z). Per call it appends for its b rows: the
    token, its log-probability, the entropy of the distribution (nats), its self-certainty,
    KL(uniform || policy) = -log V - mean_v log p_v (Zhao et al. 2025), and sum_v p_v^2 (log p_v + entropy),
    which scope.entropy_change_score is made of (if asked for, else 0); all of softmax(logits / temperature).
    """

    def __init__(
        self, rows: Tensor, position: int, *, seed: int, step: int, temperature: float, collision: bool = False
    ):
        self.rows, self.position, self.seed, self.step, self.temperature = rows, position, seed, step, temperature
        self.with_collision = collision
        self.tokens: list[Tensor] = []
        self.record: dict[str, list[Tensor]] = {name: [] for name in RECORDED}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        noise = gumbel_noise(self.seed, self.step, self.rows, self.position, logprobs.shape[-1])
        perturbed = logprobs + noise
        token = perturbed.argmax(dim=-1)
        probs = logprobs.exp()
        entropy = -(probs * logprobs).sum(dim=-1)
        self.tokens.append(token)
        self.record["logprobs"].append(logprobs.gather(1, token[:, None]).squeeze(1))
        self.record["entropy"].append(entropy)
        self.record["self_certainty"].append(-logprobs.mean(dim=-1) - math.log(logprobs.shape[-1]))
        collision = (probs**2 * (logprobs + entropy[:, None])).sum(dim=-1) if self.with_collision else entropy * 0
        self.record["collision"].append(collision)
        self.position += 1
        return perturbed


@dataclass
class Rollout:
    """B completions and what the sampler recorded of each token; positions past `mask` hold zeros.

    mask [B, C] is True up to and including the first stop token, or everywhere if none was drawn within
    the limit (`stopped` False: the completion is truncated). Values at `x[mask]` are the flat valid
    tokens, in row order: every statistic and every loss is taken over such 1-D vectors.
    """

    prompts: list[list[int]]  # B prompts, token ids
    tokens: Tensor  # [B, C] int64
    mask: Tensor  # [B, C] bool
    stopped: Tensor  # [B] bool
    logprobs: Tensor  # [B, C] float32, as are the next three; see StatelessSampler
    entropy: Tensor
    self_certainty: Tensor
    collision: Tensor

    def __getitem__(self, rows: slice) -> "Rollout":
        return Rollout(**{name: values[rows] for name, values in vars(self).items()})

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, the stop token included. [B]"""
        return self.mask.sum(dim=1)

    def cut(self, rows: list[int], config) -> Iterator[list[int]]:
        """Rows in micro-batches of similar size: so many rows and, with padding, so many tokens as config allows."""
        sizes = [len(prompt) + length for prompt, length in zip(self.prompts, self.lengths.tolist())]
        part: list[int] = []
        for row in sorted(rows, key=lambda row: (sizes[row], row)):
            tokens = (len(part) + 1) * sizes[row]
            if part and (len(part) == config.micro_batch_size or 0 < config.micro_batch_tokens < tokens):
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def pack(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Prompt and completion of some rows side by side, padded on the right only.

        A causal model needs no attention mask then: nothing attends to what comes after it, and
        positions are simply 0, 1, 2 ... Returns tokens [b, T] and predicts [b, T], True where the hidden state
        predicts a completion token: hidden[predicts] lines up with tokens[rows][mask[rows]].
        """
        lengths = self.lengths.tolist()
        starts = [len(self.prompts[row]) for row in rows]
        width = max(start + lengths[row] for start, row in zip(starts, rows))
        tokens = self.tokens.new_zeros(len(rows), width)
        predicts = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (start, row) in enumerate(zip(starts, rows)):
            end = start + lengths[row]
            tokens[i, :start] = torch.tensor(self.prompts[row])
            tokens[i, start:end] = self.tokens[row, : lengths[row]]
            predicts[i, start - 1 : end - 1] = True  # the state before a token predicts it
        return tokens, predicts


def from_completions(prompts: list[list[int]], completions: list[list[int]], device) -> Rollout:
    """Given completions as a Rollout without a record: to be scored, not sampled."""
    width = max(map(len, completions))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in completions], device=device)
    mask = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in completions], device=device)
    blank = torch.zeros(mask.shape, device=device)
    return Rollout(prompts, tokens, mask, mask.any(dim=1), blank, blank, blank, blank)


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


def sample(
    model,
    prompts: list[list[int]],
    rows: list[int],
    *,
    stop: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    step: int,
    batch_size: int = 256,
    segment: int = 128,
    collision: bool = False,
    progress=None,
) -> Rollout:
    """Sample one completion per prompt from softmax(logits / temperature), nothing cut off.

    `rows` numbers the prompts within the step, over all ranks: with (seed, step) it decides the draws.
    `batch_size` and `segment` (tokens between two sweeps of finished rows) change memory and speed only.
    `progress` is called with the number of completions done.
    """
    device = next(model.parameters()).device
    shape = (len(prompts), max_new_tokens)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    record = {name: torch.zeros(shape, device=device) for name in RECORDED}
    stop_tensor = torch.tensor(stop, device=device)
    row_keys = torch.tensor(rows, dtype=torch.long, device=device)

    with sampling_mode(model):
        for first in range(0, len(prompts), batch_size):
            alive = torch.arange(first, min(first + batch_size, len(prompts)), device=device)
            ids, attention = pad_left([prompts[i] for i in alive.tolist()], device)
            cache, drawn = None, 0
            while drawn < max_new_tokens and len(alive):
                sampler = StatelessSampler(row_keys[alive], drawn, seed=seed, step=step, temperature=temperature,
                                           collision=collision)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    past_key_values=cache,
                    logits_processor=[sampler],
                    generation_config=generation_config(min(segment, max_new_tokens - drawn), stop),
                )
                count = output.sequences.shape[1] - ids.shape[1]
                new = torch.stack(sampler.tokens[:count], dim=1)
                columns = slice(drawn, drawn + count)
                tokens[alive, columns] = new
                for name, values in record.items():
                    values[alive, columns] = torch.stack(sampler.record[name][:count], dim=1)
                drawn += count
                # Finished rows leave: the rest goes on with its part of the cache.
                going = (~torch.isin(new, stop_tensor).any(dim=1)).nonzero().squeeze(1)
                if progress is not None:
                    progress(len(alive) - (len(going) if drawn < max_new_tokens else 0))
                alive, ids = alive[going], output.sequences[going]
                attention = torch.cat([attention[going], attention.new_ones(len(going), count)], dim=1)
                cache = output.past_key_values
                cache.batch_select_indices(going)

    is_stop = torch.isin(tokens, stop_tensor)
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0  # no stop token *before* this position
    stopped = (is_stop & mask).any(dim=1)
    width = int(mask.sum(dim=1).max()) if len(prompts) else 0
    record = {name: values.masked_fill(~mask, 0.0)[:, :width] for name, values in record.items()}
    return Rollout(list(prompts), tokens.masked_fill(~mask, 0)[:, :width], mask[:, :width], stopped, **record)


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
    """Prompts side by side, padded on the left so that all end together: ids and attention mask [B, P]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """The text of each completion, special tokens left out."""
    return tokenizer.batch_decode(
        [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)], skip_special_tokens=True
    )


@torch.no_grad()
def rescore(policy, sampled: Rollout, config, world) -> Rollout:
    """The rollout with the current policy's record: what step 5 looks at after a first update."""
    fresh = {name: torch.zeros_like(getattr(sampled, name)) for name in ("logprobs", "entropy", "collision")}
    head, temperature = policy.get_output_embeddings(), config.temperature

    def record(hidden, targets):
        logits = head(hidden)
        return torch.stack([grpo.token_logprobs(logits, targets, temperature=temperature),
                            grpo.token_entropy(logits, temperature=temperature),
                            grpo.token_collision(logits, temperature=temperature)], dim=1)

    for rows in sampled.cut(range(len(sampled.mask)), config):
        tokens, predicts = sampled.pack(rows)
        mask = sampled.mask[rows]
        with world.autocast():
            hidden = hidden_states(policy, tokens)[predicts]
            values = grpo.in_chunks(record, hidden, sampled.tokens[rows][mask], size=config.logits_chunk)
        for name, column in zip(fresh, values.unbind(dim=1)):
            block = torch.zeros(mask.shape, device=mask.device)
            block[mask] = column
            fresh[name][rows] = block
    return Rollout(**vars(sampled) | fresh)
