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
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

import grpo
from support.generation import begin, generation_config, sampling_mode
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


def gumbel_noise(seed: int, step: int, rows: Tensor, position: Tensor | int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [B, V], a pure function of (seed, step, row, position). rows and position [B] int64."""
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
        self, rows: Tensor, position: Tensor, *, seed: int, step: int, temperature: float, collision: bool = False
    ):
        self.rows, self.position, self.seed, self.step, self.temperature = rows, position, seed, step, temperature
        self.with_collision = collision
        self.tokens: list[Tensor] = []
        self.record: dict[str, list[Tensor]] = {name: [] for name in RECORDED}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        noise = gumbel_noise(self.seed, self.step, self.rows, self.position, logprobs.shape[-1])
        perturbed = logprobs + noise if self.temperature else logprobs  # 0: the likeliest
        token = perturbed.argmax(dim=-1)
        probs = logprobs.exp()
        entropy = -(probs * logprobs).sum(dim=-1)
        self.tokens.append(token)
        self.record["logprobs"].append(logprobs.gather(1, token[:, None]).squeeze(1))
        self.record["entropy"].append(entropy)
        self.record["self_certainty"].append(-logprobs.mean(dim=-1) - math.log(logprobs.shape[-1]))
        collision = (probs**2 * (logprobs + entropy[:, None])).sum(dim=-1) if self.with_collision else entropy * 0
        self.record["collision"].append(collision)
        self.position = self.position + 1
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
    `batch_size` and `segment` (tokens between two sweeps: finished rows leave, new ones enter) change memory and speed
    only. `progress` is called with the number of completions done.
    """
    device = next(model.parameters()).device
    shape = (len(prompts), max_new_tokens)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    record = {name: torch.zeros(shape, device=device) for name in RECORDED}
    stop_tensor = torch.tensor(stop, device=device)
    row_keys = torch.tensor(rows, dtype=torch.long, device=device)
    batch, begun = None, 0

    with sampling_mode(model):
        while batch is not None or begun < len(prompts):
            free = batch_size if batch is None else (batch_size - len(batch.rows)) * batch.may_grow
            if begun < len(prompts) and free:
                entering = begin(model, prompts, range(begun, min(begun + free, len(prompts))))
                batch, begun = entering if batch is None else batch.joined(entering), begun + len(entering.rows)
            sampler = StatelessSampler(row_keys[batch.rows], batch.drawn, seed=seed, step=step,
                                       temperature=temperature, collision=collision)
            length = min(segment, max_new_tokens - int(batch.drawn.max()))
            output = model.generate(
                input_ids=batch.ids,
                attention_mask=batch.attention,
                past_key_values=batch.cache,
                logits_processor=[sampler],
                generation_config=generation_config(length, stop),
            )
            count = output.sequences.shape[1] - batch.ids.shape[1]
            new = torch.stack(sampler.tokens[:count], dim=1)
            place = batch.rows[:, None], batch.drawn[:, None] + torch.arange(count, device=device)
            tokens[place] = new
            for name, values in record.items():
                values[place] = torch.stack(sampler.record[name][:count], dim=1)
            finished = torch.isin(new, stop_tensor).any(dim=1) | (batch.drawn + count == max_new_tokens)
            if progress is not None:
                progress(int(finished.sum()))
            batch = batch.after(output.sequences, count, ~finished)

    is_stop = torch.isin(tokens, stop_tensor)
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0  # no stop token *before* this position
    stopped = (is_stop & mask).any(dim=1)
    width = int(mask.sum(dim=1).max()) if len(prompts) else 0
    record = {name: values.masked_fill(~mask, 0.0)[:, :width] for name, values in record.items()}
    return Rollout(list(prompts), tokens.masked_fill(~mask, 0)[:, :width], mask[:, :width], stopped, **record)


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """The text of each completion, special tokens left out."""
    return tokenizer.batch_decode(
        [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)], skip_special_tokens=True
    )


@torch.no_grad()
def rescore(policy, sampled: Rollout, config, world) -> Rollout:
    """The rollout with the current policy's record: what step 5 looks at after a first update."""
    fresh = {name: torch.zeros_like(getattr(sampled, name)) for name in ("logprobs", "entropy", "collision")}
    head, temperature = policy.get_output_embeddings(), config.temperature or 1.0

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
