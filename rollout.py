"""Rollouts: batched Hugging Face `generate` that records every token's log-probability.

Two rules make what is recorded exact:

* Sampling is *stateless*. The random numbers of a token are a hash of (seed, step, row, position).
  So a row gets the same completion (but for rounding) however rows are batched, ordered or spread
  over ranks, and resuming a run needs no random state.
* Masks come from *positions*: the first stop token ends a completion and belongs to it. No mask is
  made by comparing with a pad id, because the pad id may be the stop id.

Shapes: B completions, P padded prompt length, C padded completion length, T = P + C, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer

import grpo
from objectives import MicroBatch
from support.models import hidden_states

# ---------------------------------------------------------------- the sampler

# The constants of SplitMix64 as signed 64-bit integers; GOLDEN is odd and near 2^64 / phi.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def splitmix64(x: Tensor) -> Tensor:
    """Hash 64-bit integers by SplitMix64's finaliser (Steele, Lea & Flood 2014).  int64, any shape

    `>>` is arithmetic on signed integers; the masks turn it into the logical shift that the hash
    needs.
    """
    x = (x ^ (x >> 30 & 2**34 - 1)) * MIX_1
    x = (x ^ (x >> 27 & 2**37 - 1)) * MIX_2
    return x ^ (x >> 31 & 2**33 - 1)


def uniform(seed: int, step: int, rows: Tensor, position: Tensor | int) -> Tensor:
    """Return one number in (0, 1) for each row, a pure function of (seed, step, row, position).

    rows and position [B] int64 -> [B] float64, odd multiples of 2^-41.
    """
    key = torch.zeros_like(rows)
    for word in (seed, step, rows, position):
        key = splitmix64(key + word + GOLDEN)
    bits = key >> 24 & 2**40 - 1
    return (bits.double() + 0.5) * 2.0**-40


def sample_tokens(probs: Tensor, number: Tensor) -> Tensor:
    """Sample a token of each row by the inverse of the cumulative distribution.  [B, V], [B] -> [B]

    This is the first token whose cumulative probability exceeds `number` times the total. The sums
    are fp64, so that a probability is exact to 2^-40; a token of probability 0 is never sampled.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    threshold = number[:, None] * cumulative[:, -1:]
    # The first, and not a binary search: a GPU adds in parts, so rounding may make sums decrease.
    exceeds = (cumulative > threshold) & (probs > 0)
    return exceeds.to(torch.uint8).argmax(dim=-1)


def token_numbers(logprobs: Tensor, probs: Tensor, tokens: Tensor) -> Tensor:
    """Describe tokens and their distributions by four numbers.  [n, V], [n, V], [n] -> [n, 4]

    They are the log-probability of the token, the entropy in nats, the self-certainty
    KL(uniform || policy) = -log V - mean_v log p_v (Zhao et al. 2025), and sum_v p_v^2 (log p_v +
    entropy), the baseline of scope.entropy_change_score.
    """
    weighted = probs * logprobs
    entropy = -weighted.sum(dim=1)
    self_certainty = -logprobs.mean(dim=1) - math.log(logprobs.shape[1])
    baseline = (probs * weighted).sum(dim=1) + entropy * probs.square().sum(dim=1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return torch.stack([chosen, entropy, self_certainty, baseline], dim=1)


class StatelessSampler(LogitsProcessor):
    """Samples the next token and records it; `generate` then only takes the argmax.

    Each call appends, for its b rows, the token and the `token_numbers` of softmax(logits /
    temperature). Temperature 0 is greedy decoding; the numbers are then those of softmax(logits).
    """

    def __init__(self, rows: Tensor, position: Tensor, *, seed: int, step: int, temperature: float):
        self.rows = rows
        self.position = position
        self.seed = seed
        self.step = step
        self.temperature = temperature
        self.tokens: list[Tensor] = []
        self.record: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        probs = logprobs.exp()
        if self.temperature > 0:
            number = uniform(self.seed, self.step, self.rows, self.position)
            token = sample_tokens(probs, number)
        else:
            token = logprobs.argmax(dim=-1)
        self.tokens.append(token)
        self.record.append(token_numbers(logprobs, probs, token))
        self.position = self.position + 1
        return logprobs.scatter_(1, token[:, None], math.inf)


# ---------------------------------------------------------------- the record


@dataclass
class Rollout:
    """Holds B completions, what the sampler recorded of each token, and what the step adds.

    mask [B, C] is True up to and including the first stop token, or everywhere if there was none
    within the limit (`stopped` is then False: the completion is truncated). Positions outside the
    mask hold zeros. For any field x [B, C], x[mask] is the flat vector of its valid tokens in row
    order; every statistic and every loss is taken over such vectors.
    """

    prompts: list[list[int]]  # B prompts, token ids
    tokens: Tensor  # [B, C] int64
    mask: Tensor  # [B, C] bool
    stopped: Tensor  # [B] bool
    logprobs: Tensor  # [B, C] float32, as are the next three; see token_numbers
    entropy: Tensor
    self_certainty: Tensor
    entropy_baseline: Tensor
    correct: Tensor | None = None  # [B] bool, set by part 3 of train.py
    rewards: Tensor | None = None  # [B], set by part 3
    advantages: Tensor | None = None  # [B], set by part 4
    selected: Tensor | None = None  # [B, C] bool, set by part 5: tokens that pay the KL penalty
    token_mask: Tensor | None = None  # [B, C] bool, set by part 5: special to the objective

    def __getitem__(self, rows: slice) -> "Rollout":
        fields = {}
        for name, values in vars(self).items():
            fields[name] = None if values is None else values[rows]
        return Rollout(**fields)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each completion, the stop token included.  [B]"""
        return self.mask.sum(dim=1)

    def split(self, count: int) -> list["Rollout"]:
        """Cut the completions into `count` parts of equal size, in order."""
        size = len(self.prompts) // count
        return [self[i * size : (i + 1) * size] for i in range(count)]

    def micro_batches(self, config, rows: list[int] | None = None) -> list[list[int]]:
        """Group rows of similar length into micro-batches, the longest first.

        The longest come first so that running out of memory shows at once. Each has at most
        micro_batch_size rows and, unless it is a single row, at most micro_batch_tokens tokens,
        padding included.
        """
        if rows is None:
            rows = list(range(len(self.prompts)))
        sizes = [
            len(prompt) + length for prompt, length in zip(self.prompts, self.lengths.tolist())
        ]
        batches: list[list[int]] = []
        for row in sorted(rows, key=lambda row: (sizes[row], row)):
            full = not batches or len(batches[-1]) == config.micro_batch_size
            if not full and config.micro_batch_tokens > 0:
                full = (len(batches[-1]) + 1) * sizes[row] > config.micro_batch_tokens
            if full:
                batches.append([])
            batches[-1].append(row)
        return batches[::-1]

    def pad(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Concatenate prompt and completion of some rows and pad them on the right.

        A causal model then needs no attention mask: nothing attends to what comes after it, and
        positions are simply 0, 1, 2 ... Returns tokens [b, T] and predicts_completion [b, T], True
        where the hidden state predicts a completion token. So hidden[predicts_completion] lines up
        with self.tokens[rows][self.mask[rows]].
        """
        lengths = self.lengths.tolist()
        starts = [len(self.prompts[row]) for row in rows]
        width = max(start + lengths[row] for start, row in zip(starts, rows))
        tokens = self.tokens.new_zeros(len(rows), width)
        predicts_completion = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (start, row) in enumerate(zip(starts, rows)):
            end = start + lengths[row]
            tokens[i, :start] = torch.tensor(self.prompts[row])
            tokens[i, start:end] = self.tokens[row, : lengths[row]]
            # the hidden state before a token predicts it
            predicts_completion[i, start - 1 : end - 1] = True
        return tokens, predicts_completion

    def collate(self, rows: list[int], weight: Tensor, sequence_weight: Tensor) -> MicroBatch:
        """Make the micro-batch of some rows.

        weight and sequence_weight [B] are those of each completion; see MicroBatch.
        """
        tokens, predicts_completion = self.pad(rows)
        mask = self.mask[rows]

        def flat(values: Tensor) -> Tensor:
            """Return the values of the valid tokens; a value per completion is repeated."""
            values = values[rows]
            if values.ndim == 1:
                values = values[:, None].expand_as(mask)
            return values[mask]

        return MicroBatch(
            rows,
            tokens,
            predicts_completion,
            targets=flat(self.tokens),
            old_logprobs=flat(self.logprobs),
            advantages=flat(self.advantages),
            correct=flat(self.correct),
            selected=flat(self.selected),
            token_mask=flat(self.token_mask),
            weight=flat(weight),
            sequence_weight=flat(sequence_weight),
        )


# ---------------------------------------------------------------- sampling with `generate`


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
    progress=None,
) -> Rollout:
    """Sample one completion per prompt from softmax(logits / temperature), without top-k or top-p.

    `rows` numbers the prompts within the step, over all ranks; with (seed, step) it decides the
    random numbers. At most `batch_size` completions are sampled at once. After every `segment`
    tokens finished rows leave the batch and new ones enter. Both settings change memory and speed
    only.
    `progress` is called with the number of finished completions.
    """
    device = next(model.parameters()).device
    shape = (len(prompts), max_new_tokens)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    record = torch.zeros(*shape, 4, device=device)
    stop_tensor = torch.tensor(stop, device=device)
    row_numbers = torch.tensor(rows, dtype=torch.long, device=device)
    batch = None
    started = 0

    with sampling_mode(model):
        while batch is not None or started < len(prompts):
            free = batch_size
            if batch is not None:
                free = batch_size - len(batch.rows) if batch.can_append else 0
            if started < len(prompts) and free > 0:
                new = prefill(model, prompts, range(started, min(started + free, len(prompts))))
                batch = new if batch is None else batch.append(new)
                started += len(new.rows)
            sampler = StatelessSampler(
                row_numbers[batch.rows],
                batch.lengths,
                seed=seed,
                step=step,
                temperature=temperature,
            )
            output = model.generate(
                input_ids=batch.ids,
                attention_mask=batch.attention,
                past_key_values=batch.cache,
                logits_processor=[sampler],
                generation_config=generation_config(
                    min(segment, max_new_tokens - int(batch.lengths.max())), stop
                ),
            )
            count = output.sequences.shape[1] - batch.ids.shape[1]
            sampled = torch.stack(sampler.tokens[:count], dim=1)
            index = batch.rows[:, None], batch.lengths[:, None] + torch.arange(count, device=device)
            tokens[index] = sampled
            record[index] = torch.stack(sampler.record[:count], dim=1)
            finished = torch.isin(sampled, stop_tensor).any(dim=1) | (
                batch.lengths + count == max_new_tokens
            )
            if progress is not None:
                progress(int(finished.sum()))
            batch = batch.advance(output.sequences, count, ~finished)

    is_stop = torch.isin(tokens, stop_tensor)
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0  # no stop token *before* this position
    stopped = (is_stop & mask).any(dim=1)
    width = int(mask.sum(dim=1).max()) if prompts else 0
    tokens = tokens.masked_fill(~mask, 0)[:, :width]
    record = record.masked_fill(~mask[:, :, None], 0.0)[:, :width].unbind(dim=2)
    return Rollout(list(prompts), tokens, mask[:, :width], stopped, *record)


def sampling_settings(config) -> dict:
    """Return the settings of `sample` that training and evaluation share."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "batch_size": config.rollout.batch_size,
        "segment": config.rollout.segment,
    }


@contextmanager
def sampling_mode(model) -> Iterator[None]:
    """Use eval(), no gradients and an empty generation config; restore everything afterwards.

    The model's own generation_config would fill every field that ours leaves unset (a repetition
    penalty, suppressed tokens ...), and the distribution that is sampled from would no longer be
    the one that is trained. Meanwhile a fp32 copy of bf16 weights of the vocabulary projection is
    kept, which would otherwise be made for every token.
    """
    generation = model.generation_config
    training = model.training
    head = model.get_output_embeddings()
    model.generation_config = GenerationConfig()
    model.eval()  # in train mode gradient checkpointing would also switch the KV cache off
    try:
        if head.weight.dtype != torch.float32:
            head.fp32_weight = head.weight.detach().float()
        with torch.no_grad():
            yield
    finally:
        model.generation_config = generation
        model.train(training)
        head.fp32_weight = None


def generation_config(max_new_tokens: int, stop: list[int]) -> GenerationConfig:
    """Configure greedy `generate`, because StatelessSampler has already sampled the token.

    Whatever else `generate` would do to the logits is switched off by name.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],  # only what `generate` writes after a finished row; it is never read
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


@dataclass
class Batch:
    """Holds the b unfinished completions that are sampled together, and their KV cache."""

    rows: Tensor  # [b] index of the prompt
    lengths: Tensor  # [b] tokens sampled so far
    ids: Tensor  # [b, L] prompts and sampled tokens
    attention: Tensor  # [b, L] 0 at the padding
    cache: DynamicCache  # of all columns but the last, which `generate` takes next

    @property
    def can_append(self) -> bool:
        """Return whether rows can be added: the cache of a sliding window cannot be padded."""
        return all(isinstance(layer, BlockLayer) for layer in self.cache.layers)

    def append(self, other: "Batch") -> "Batch":
        """Add the rows of another batch; the narrower of the two is padded on the left.

        The KV cache of this batch is changed in place.
        """
        for mine, new in zip(self.cache.layers, other.cache.layers):
            mine.keys = stack_rows(mine.keys, new.keys, dim=-2)
            mine.values = stack_rows(mine.values, new.values, dim=-2)
            mine.memory = []
        return Batch(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.lengths, other.lengths]),
            stack_rows(self.ids, other.ids, dim=-1),
            stack_rows(self.attention, other.attention, dim=-1),
            self.cache,
        )

    def advance(self, sequences: Tensor, count: int, unfinished: Tensor) -> "Batch | None":
        """Return the batch after `count` more tokens, without finished rows.

        It is None if all rows have finished. Columns that are padding in all rows are dropped too.
        The KV cache is changed in place.
        """
        if not unfinished.any():
            return None
        rows = unfinished.nonzero().squeeze(1)
        attention = torch.cat(
            [self.attention[rows], self.attention.new_ones(len(rows), count)], dim=1
        )
        if len(rows) < len(unfinished):
            self.cache.batch_select_indices(rows)
        padding = 0
        if self.can_append:
            padding = int(attention.argmax(dim=1).min())
        if padding:
            for layer in self.cache.layers:
                layer.keys = layer.keys[..., padding:, :]
                layer.values = layer.values[..., padding:, :]
        return Batch(
            self.rows[rows],
            self.lengths[rows] + count,
            sequences[rows, padding:],
            attention[:, padding:],
            self.cache,
        )


class BlockLayer(DynamicLayer):
    """Holds the keys and values of one layer in memory that grows by BLOCK columns at a time.

    New columns are written in place. DynamicLayer copies the whole cache for every token.
    """

    BLOCK = 128
    memory: list[Tensor] = []  # of keys and of values; self.keys and self.values are its start

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append the keys and values of new columns, and return those of all columns."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        # selecting rows or columns has replaced self.keys by a copy, or by a later part of memory
        replaced = not self.memory or self.memory[0].data_ptr() != self.keys.data_ptr()
        if replaced or stop > self.memory[0].shape[-2]:
            shape = [*self.keys.shape[:-2], stop + self.BLOCK]
            self.memory = [x.new_empty(*shape, x.shape[-1]) for x in (self.keys, self.values)]
            self.memory[0][..., :start, :] = self.keys
            self.memory[1][..., :start, :] = self.values
        self.memory[0][..., start:stop, :] = key_states
        self.memory[1][..., start:stop, :] = value_states
        self.keys = self.memory[0][..., :stop, :]
        self.values = self.memory[1][..., :stop, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor):
        """Keep some rows, in new memory of their size; the old memory is free at once."""
        super().batch_select_indices(indices)
        self.memory = []


def prefill(model, prompts: list[list[int]], rows: range) -> Batch:
    """Run the prompts of some rows through the model, each distinct prompt once."""
    device = next(model.parameters()).device
    distinct: dict[tuple[int, ...], int] = {}
    for row in rows:
        distinct.setdefault(tuple(prompts[row]), len(distinct))
    width = max(2, *map(len, distinct))  # 2 or more, because the last is left to `generate`
    ids = torch.tensor(
        [[0] * (width - len(prompt)) + list(prompt) for prompt in distinct], device=device
    )
    attention = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in distinct], device=device
    )
    cache = DynamicCache(config=model.config)
    cache.layers = [
        BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    model.base_model(
        ids[:, :-1],
        attention_mask=attention[:, :-1],
        past_key_values=cache,
        use_cache=True,
        position_ids=(attention[:, :-1].cumsum(dim=1) - 1).clamp(min=0),
    )
    copies = torch.tensor([distinct[tuple(prompts[row])] for row in rows], device=device)
    cache.batch_select_indices(copies)
    numbers = torch.tensor(list(rows), device=device)
    return Batch(numbers, torch.zeros_like(numbers), ids[copies], attention[copies], cache)


def stack_rows(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Concatenate the rows of two tensors; the narrower one gets zeros on its left.

    `dim`, which is -1 or -2, is the dimension of the columns.
    """
    width = max(a.shape[dim], b.shape[dim])
    padded = []
    for x in (a, b):
        before_last = [0, 0] * (-1 - dim)
        padded.append(functional.pad(x, [*before_last, width - x.shape[dim], 0]))
    return torch.cat(padded)


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """Return the text of each completion, without special tokens."""
    ids = [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------- rescoring


@torch.no_grad()
def rescore(policy, rollout: Rollout, config, world) -> Rollout:
    """Return the rollout with the `token_numbers` of the current policy.

    With several updates per rollout, training uses it before each of them: before the first so that
    ratios contain no rounding of the KV cache, and later because the policy has changed.
    """
    head = policy.get_output_embeddings()
    temperature = config.temperature or 1.0

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        logprobs = torch.log_softmax(head(hidden) / temperature, dim=1)
        return token_numbers(logprobs, logprobs.exp(), targets)

    record = torch.zeros(*rollout.mask.shape, 4, device=rollout.mask.device)
    for rows in rollout.micro_batches(config):
        tokens, predicts_completion = rollout.pad(rows)
        mask = rollout.mask[rows]
        with world.autocast():
            hidden = hidden_states(policy, tokens)[predicts_completion]
            values = grpo.in_chunks(
                score, hidden, rollout.tokens[rows][mask], size=config.logits_chunk
            )
        block = torch.zeros(*mask.shape, 4, device=mask.device)
        block[mask] = values
        record[rows] = block
    names = ("logprobs", "entropy", "self_certainty", "entropy_baseline")
    return dataclasses.replace(rollout, **dict(zip(names, record.unbind(dim=2))))
