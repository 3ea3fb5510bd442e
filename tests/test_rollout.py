"""Sampling, on tiny random models: the right distribution and record, whatever the batching."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, config_of, tiny_model
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

import rollout
from grpo import token_logprobs
from rollout import BlockLayer, StatelessSampler, rescore, sample_tokens, splitmix64, uniform
from support import models

STOP = [1, 5]
N = 100_000  # draws of a statistical test


def sample(model, prompts, rows=None, **changes):
    arguments = dict(stop=STOP, max_new_tokens=20, temperature=1.0, seed=3, step=2)
    return rollout.sample(model, prompts, rows or list(range(len(prompts))), **arguments | changes)


def rows_of(result):
    """Return the tokens of each row, free of padding."""
    return [tuple(tokens[mask].tolist()) for tokens, mask in zip(result.tokens, result.mask)]


def check_scored_again(model, result):
    """Assert that the scorer, which pads on the right and has no cache, finds what was recorded."""
    scored = rescore(model, result, config_of(), ALONE)
    assert_close(scored.logprobs, result.logprobs, rtol=0, atol=1e-4)
    assert_close(scored.entropy, result.entropy, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the random numbers


def uniforms(*, seed=0, step=0, first_row=0, position=0):
    """Return the random numbers [N] of N rows."""
    return uniform(seed, step, torch.arange(first_row, first_row + N), position)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def slow_splitmix64(x: int) -> int:
    """Apply SplitMix64's finaliser to a whole number, cut to 64 bits as the paper's C does."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_splitmix64():
    """Against its published first outputs from seed 0, and an unsigned reference."""
    golden = 0x9E3779B97F4A7C15
    assert [slow_splitmix64(golden * k % 2**64) for k in (1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator)
    numbers = torch.cat([numbers, torch.arange(-3, 4)])
    expected = [slow_splitmix64(x % 2**64) for x in numbers.tolist()]
    assert [x % 2**64 for x in splitmix64(numbers).tolist()] == expected


def test_uniforms_fill_the_interval():
    """Chi-square over 100 bins, 99 degrees of freedom: 4 standard deviations is 155."""
    numbers = uniforms()
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    assert ((counts - N / 100) ** 2 / (N / 100)).sum() < 155
    assert (numbers * 2**41 % 2 == 1).all()  # never 0 or 1, and exact in fp64
    assert len(numbers.unique()) == N


NEIGHBOURS = [{"seed": 1}, {"step": 1}, {"position": 1}, {"first_row": 1}]


# step -1 is that of evaluations
@pytest.mark.parametrize("changes", [*NEIGHBOURS, {"step": -1}, {"seed": 2**31}])
def test_numbers_are_independent_of_their_neighbour(changes):
    a = uniforms()
    b = uniforms(**changes)
    assert abs(correlation(a, b)) < 4 / N**0.5
    assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < 4 / N**0.5  # nor in magnitude


# ---------------------------------------------------------------- the draws


def draws(logits, *, first_row=0, position=0, seed=0, step=0, temperature=1.0):
    rows = torch.arange(first_row, first_row + N)
    sampler = StatelessSampler(rows, position, seed=seed, step=step, temperature=temperature)
    scores = sampler(None, logits.expand(N, -1))
    assert (scores.argmax(dim=-1) == sampler.tokens[0]).all()  # what `generate` will take
    return sampler.tokens[0]


LOGITS = torch.tensor([1.0, 0.5, 0.0, -1.0, -1.5, 2.0, -1.8, 0.1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(temperature):
    """Chi-square with 7 degrees of freedom; 99.99 % lie below 29.9."""
    expected = torch.softmax(LOGITS / temperature, dim=0) * N
    counts = torch.bincount(draws(LOGITS, temperature=temperature), minlength=8)
    assert (expected > 20).all()
    assert ((counts - expected) ** 2 / expected).sum() < 29.9


def test_the_draw_inverts_the_cumulative_distribution():
    """Against exact sums, at Qwen's vocabulary, and at both ends of every token's interval."""
    logits = 3 * torch.randn(3, 152_000, generator=torch.Generator().manual_seed(0))
    probs = torch.softmax(logits, dim=-1)
    numbers = uniforms()[:3]
    for row, token in enumerate(sample_tokens(probs, numbers).tolist()):
        exact = probs[row].tolist()
        threshold = numbers[row].item() * math.fsum(exact)
        assert math.fsum(exact[:token]) <= threshold < math.fsum(exact[: token + 1])
    small = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = [2.0**-41, 0.25 - 2**-41, 0.25, 0.75 - 2**-41, 0.75, 1 - 2**-41]
    drawn = sample_tokens(small.expand(6, -1), torch.tensor(numbers, dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]


def test_record_of_a_draw():
    """log p, entropy and self-certainty of the drawn token, by loops; temperature included."""
    logits = 2 * torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    sampler = StatelessSampler(torch.arange(50), 0, seed=0, step=0, temperature=0.7)
    sampler(None, logits)
    for b in range(50):
        weights = [math.exp(z / 0.7) for z in logits[b].tolist()]
        probs = [w / sum(weights) for w in weights]
        entropy = -sum(p * math.log(p) for p in probs)
        expected = [
            math.log(probs[sampler.tokens[0][b]]),
            entropy,
            sum(1 / 9 * math.log((1 / 9) / p) for p in probs),  # KL(uniform || policy)
            sum(p**2 * (math.log(p) + entropy) for p in probs),
        ]
        assert sampler.record[0][b].tolist() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- the cache


def test_a_block_layer_is_a_dynamic_layer():
    """The same keys and values after growing, selecting rows, dropping columns and appending."""
    generator = torch.Generator().manual_seed(0)
    ours = BlockLayer()
    usual = DynamicLayer()
    copies = 0
    for i in range(300):
        new = torch.randn(2, len(ours.keys) if i else 6, 2, 1 + i % 3, 4, generator=generator)
        before = ours.memory
        for keys, values in zip(ours.update(*new), usual.update(*new)):
            assert torch.equal(keys, values)
        copies += ours.memory is not before
        if ours.memory:
            assert ours.memory[0].shape[-2] <= ours.keys.shape[-2] + BlockLayer.BLOCK
        if i == 100:
            for layer in (ours, usual):
                layer.batch_select_indices(torch.tensor([5, 0, 3]))
            assert not ours.memory  # the rows that left take no memory
        if i == 150:
            for layer in (ours, usual):
                layer.keys = layer.keys[..., 7:, :]
                layer.values = layer.values[..., 7:, :]
        if i == 200:
            for layer in (ours, usual):
                layer.keys = torch.cat([layer.keys, layer.keys])
                layer.values = torch.cat([layer.values, layer.values])
        assert torch.equal(ours.keys, usual.keys)
        assert ours.get_seq_length() == usual.get_seq_length()
    assert copies < 10  # 600 columns, and three changes


def test_a_fp32_copy_of_the_vocabulary_projection_is_kept_while_sampling(prompts):
    model = tiny_model().bfloat16()
    models.use_fp32_logits(model)
    head = model.get_output_embeddings()
    used = []
    head.register_forward_hook(lambda *call: used.append(head.fp32_weight))
    first = sample(model, prompts)
    assert used[0] is used[-1]
    assert torch.equal(used[0], head.weight.float())
    assert head.fp32_weight is None
    with torch.no_grad():
        head.weight.mul_(2)  # as an update does
    second = sample(model, prompts)
    assert torch.equal(used[-1], head.weight.float())
    assert rows_of(first) != rows_of(second)


# ---------------------------------------------------------------- completions


def test_same_completions_however_batched_split_or_ordered(model, prompts):
    whole = sample(model, prompts)
    # unequal lengths, or the test shows little
    assert len({len(row) for row in rows_of(whole)}) > 3
    assert 0 < whole.stopped.sum() < len(prompts)
    for changes in (
        {"batch_size": 5},
        {"batch_size": 1},
        {"segment": 1},
        {"segment": 7, "batch_size": 4},
    ):
        other = sample(model, prompts, **changes)
        assert rows_of(other) == rows_of(whole), changes
        assert_close(other.logprobs, whole.logprobs, rtol=1e-4, atol=1e-5)
        assert_close(other.entropy, whole.entropy, rtol=1e-4, atol=1e-5)
    order = [7, 2, 11, 0, 5]
    shuffled = sample(model, [prompts[i] for i in order], order)
    assert rows_of(shuffled) == [rows_of(whole)[i] for i in order]


def test_seed_step_and_row_change_the_completions(model, prompts):
    first = rows_of(sample(model, prompts))
    assert rows_of(sample(model, prompts, seed=4)) != first
    assert rows_of(sample(model, prompts, step=3)) != first
    assert rows_of(sample(model, prompts, rows=list(range(12, 24)))) != first
    same_prompt = rows_of(sample(model, [prompts[0]] * 8))
    assert len(set(same_prompt)) == 8  # a group is not eight copies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_equals_recomputed(model, temperature, prompts):
    """What the sampler records (left-padded, cached) is what the trainer scores (right-padded, no
    cache).
    """
    result = sample(model, prompts, temperature=temperature, segment=6)
    for rows in (list(range(12)), [4, 9], [11]):
        tokens, predicts_completion = result.pad(rows)
        with torch.no_grad():
            hidden = models.hidden_states(model, tokens)[predicts_completion]
            logits = model.get_output_embeddings()(hidden)
        mask = result.mask[rows]
        logprobs = token_logprobs(logits, result.tokens[rows][mask], temperature=temperature)
        assert_close(logprobs, result.logprobs[rows][mask], rtol=0, atol=1e-4)


def test_mask_is_up_to_and_including_the_first_stop_token(model, prompts):
    # Prompts may hold stop tokens and zeros: these are attended to, and no part of any mask.
    prompts = [[1, *prompt, 5, 0, 2] for prompt in prompts]
    result = sample(model, prompts)
    for b in range(len(prompts)):
        row = result.tokens[b][result.mask[b]].tolist()
        assert result.mask[b].long().diff().max() <= 0  # one run of True, from the start
        assert not set(row[:-1]) & set(STOP)
        assert (row[-1] in STOP) == result.stopped[b]
        assert result.stopped[b] or len(row) == 20
    for name in ("tokens", "logprobs", "entropy", "self_certainty", "entropy_baseline"):
        assert (getattr(result, name)[~result.mask] == 0).all(), name
    assert (result.logprobs[result.mask] < 0).all()
    assert result.lengths.tolist() == [len(row) for row in rows_of(result)]
    words = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ids)
    assert rollout.decode(words, result) == [list(row) for row in rows_of(result)]
    assert {row[-1] for row in rows_of(result)} >= set(STOP)  # both stop ids end rows


def test_token_zero_may_be_a_stop_id(model, prompts):
    """pad id == stop id == 0, as when pad is eos: masks come from positions."""
    result = sample(model, prompts, stop=[0])
    for row, stopped in zip(rows_of(result), result.stopped.tolist()):
        assert (row[-1] == 0) == stopped
        assert 0 not in row[:-1]


def test_the_models_own_generation_config_does_not_leak_in(model, prompts):
    plain = sample(model, prompts)
    generation = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(2, 30)),
        eos_token_id=1,
    )
    model.generation_config = generation
    assert rows_of(sample(model, prompts)) == rows_of(plain)
    assert model.generation_config is generation  # and it is left as it was
    assert not model.training


def test_sampling_leaves_training_mode_and_uses_the_cache(model, prompts):
    """With gradient checkpointing a model in train() drops its KV cache; sampling happens in
    eval().
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, shapes = sample_and_watch(model, prompts)
    assert shapes[0][1] == max(map(len, prompts)) - 1
    assert {columns for _, columns in shapes[1:]} == {1}
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def sample_and_watch(model, prompts, **changes):
    """Return the rollout, and (rows, columns) of each forward pass."""
    shapes = []

    def watch(module, arguments, named):
        hidden = arguments[0] if arguments else named["hidden_states"]
        shapes.append(hidden.shape[:2])

    hook = model.base_model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    result = sample(model, prompts, **changes)
    hook.remove()
    return result, shapes


def test_columns_that_are_padding_everywhere_are_dropped(model):
    """When the longest prompt leaves, the others need no place for it."""
    batch = rollout.prefill(model, [[2, 3, 4], [5] * 7], range(2))
    left = batch.advance(batch.ids, 0, torch.tensor([True, False]))
    assert left.ids.tolist() == [[2, 3, 4]]
    assert left.attention.tolist() == [[1, 1, 1]]
    for layer in left.cache.layers:
        assert layer.keys.shape[-2] == layer.values.shape[-2] == 2


def test_new_rows_enter_where_others_have_finished(model, prompts):
    """Against a simulation by counts alone: 4 rows at once, swept after every 2 tokens."""
    prompts = [*prompts, *prompts]
    result, shapes = sample_and_watch(model, prompts, segment=2, batch_size=4)
    waiting = result.lengths.tolist()
    batch = []  # of each row the number of tokens that remain and that are sampled
    expected = []
    while waiting or batch:
        while waiting and len(batch) < 4:
            batch.append((waiting.pop(0), 0))
        for _ in range(min(2, 20 - max(count for _, count in batch))):
            if any(remaining > 0 for remaining, _ in batch):  # else `generate` stops
                expected.append(len(batch))
                batch = [(remaining - 1, count + 1) for remaining, count in batch]
        batch = [(remaining, count) for remaining, count in batch if remaining > 0]
    assert [rows for rows, columns in shapes if columns == 1] == expected
    lengths = result.lengths.tolist()
    one_batch_after_another = sum(max(lengths[i : i + 4]) for i in range(0, len(prompts), 4))
    assert len(expected) < 0.9 * one_batch_after_another


def test_a_prompt_of_a_group_is_read_once(model, prompts):
    groups = [prompt for prompt in prompts for _ in range(8)]
    result, shapes = sample_and_watch(model, groups)
    assert shapes[0] == (len(prompts), max(map(len, prompts)) - 1)
    assert len(result.prompts) == 8 * len(prompts)


def test_a_sliding_window_is_sampled_batch_by_batch(prompts):
    """Its cache holds the last columns only, so that rows leave but none enter."""
    model = tiny_model("mistral", sliding_window=4)
    whole, shapes = sample_and_watch(model, prompts, batch_size=5, segment=3)
    assert rows_of(whole) == rows_of(sample(model, prompts))
    assert sum(columns > 1 for _, columns in shapes) == 3
    check_scored_again(model, whole)


def test_temperature_0_is_greedy(model, prompts):
    """Whatever the noise; the record is that of temperature 1."""
    greedy = sample(model, prompts, temperature=0.0, seed=0)
    assert rows_of(greedy) == rows_of(sample(model, prompts, temperature=0.0, seed=1))
    for prompt, row in zip(prompts, rows_of(greedy)):
        ids = torch.tensor([[*prompt, *row]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == list(row)
    check_scored_again(model, greedy)


def test_prompts_of_one_token(model):
    """There is nothing to read before the first token is sampled."""
    prompts = [[7], [9], [7], [3, 4, 5]]
    short = sample(model, prompts, batch_size=2, segment=3)
    assert rows_of(short) == rows_of(sample(model, prompts))
    check_scored_again(model, short)


def test_progress_counts_every_completion_once(model, prompts):
    done = []
    sample(model, prompts, segment=3, batch_size=5, progress=done.append)
    assert sum(done) == len(prompts)


# ---------------------------------------------------------------- micro-batches


def made_up_rollout():
    """Return a rollout whose rows have 3, 7, 4, 5, 7, 3 tokens, prompts of 2 included."""
    lengths = torch.tensor([1, 5, 2, 3, 5, 1])
    mask = torch.arange(5) < lengths[:, None]
    zeros = torch.zeros(6, 5)
    tokens = (torch.arange(30).view(6, 5) + 10) * mask
    return rollout.Rollout([[2, 3]] * 6, tokens, mask, mask.any(dim=1), zeros, zeros, zeros, zeros)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["micro_batch_size=2"], [[1, 4], [2, 3], [0, 5]]),
        (["micro_batch_size=4"], [[1, 4], [0, 5, 2, 3]]),
        (["micro_batch_tokens=14"], [[4], [3, 1], [0, 5, 2]]),
        (["micro_batch_tokens=1"], [[4], [1], [3], [2], [5], [0]]),  # one row is the least
    ],
)
def test_micro_batches(arguments, expected):
    """Rows of similar length are together, the longest first, within both limits."""
    assert made_up_rollout().micro_batches(config_of(*arguments)) == expected


def test_micro_batches_of_some_rows():
    assert made_up_rollout().micro_batches(config_of("micro_batch_size=2"), [5, 1, 3]) == [
        [1],
        [5, 3],
    ]
    assert made_up_rollout().micro_batches(config_of(), []) == []


def test_slices_and_parts():
    """Fields that are not set yet stay unset."""
    whole = made_up_rollout()
    whole.advantages = torch.arange(6.0)
    parts = whole.split(3)
    assert [part.advantages.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.lengths.tolist() for part in parts] == [[1, 5], [2, 3], [5, 1]]
    assert all(len(part.prompts) == 2 and part.rewards is None for part in parts)


def test_collate():
    """Every flat vector lines up with the completion's tokens, whatever the padding."""
    whole = made_up_rollout()
    whole.advantages = torch.arange(6.0)
    whole.correct = torch.arange(6) % 2 == 0
    whole.selected = whole.tokens % 3 == 0
    whole.token_mask = whole.tokens % 4 == 0
    batch = whole.collate(
        [3, 0], weight=torch.arange(6.0) + 1, sequence_weight=torch.arange(6.0) + 2
    )
    assert batch.tokens.tolist() == [[2, 3, 25, 26, 27], [2, 3, 10, 0, 0]]
    assert batch.predicts_completion.int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [25, 26, 27, 10]
    assert batch.advantages.tolist() == [3, 3, 3, 0]
    assert batch.correct.tolist() == [False, False, False, True]
    assert batch.selected.tolist() == [False, False, True, False]
    assert batch.token_mask.tolist() == [False] * 4
    assert batch.weight.tolist() == [4, 4, 4, 1]
    assert batch.sequence_weight.tolist() == [5, 5, 5, 2]
