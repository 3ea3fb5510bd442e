"""Sampling: the right distribution, the right record, whatever the batching. On tiny random Qwen2 and Llama models."""

import math

import pytest
import torch
from helpers import ALONE, VOCABULARY, config_of, tiny_model
from transformers import GenerationConfig

import grpo
import rollout
from support import models

STOP = [1, 5]


def sample(model, prompts, rows=None, **changes):
    arguments = dict(stop=STOP, max_new_tokens=20, temperature=1.0, seed=3, step=2)
    return rollout.sample(model, prompts, rows or list(range(len(prompts))), **arguments | changes)


def rows_of(result):
    """What matters of each row, free of padding width."""
    return [tuple(result.tokens[b][result.mask[b]].tolist()) for b in range(len(result.mask))]


# ---------------------------------------------------------------- the noise


N = 100_000


def uniforms(**changes):
    """[N, 2] uniforms behind the noise of rows 0..N-1 for two vocabulary entries."""
    arguments = dict(seed=0, step=0, rows=torch.arange(N), position=0) | changes
    gumbel = rollout.gumbel_noise(arguments["seed"], arguments["step"], arguments["rows"], arguments["position"], 2)
    return torch.exp(-torch.exp(-gumbel.double()))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on whole numbers of any size, cut to 64 bits as the paper's C does."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_mix_is_splitmix64():
    """Against its published first outputs from seed 0, and an unsigned reference."""
    golden = 0x9E3779B97F4A7C15
    assert [splitmix(golden * k % 2**64) for k in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    numbers = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([numbers, torch.arange(-3, 4)])
    assert [x % 2**64 for x in rollout.mix(numbers).tolist()] == [splitmix(x % 2**64) for x in numbers.tolist()]


def test_noise_is_gumbel():
    gumbel = rollout.gumbel_noise(0, 0, torch.arange(N), 0, 4).double().flatten()
    assert gumbel.isfinite().all()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=4 * 1.2825 / (4 * N) ** 0.5)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_uniforms_fill_the_interval():
    """Chi-square over 100 bins, 99 degrees of freedom: 4 standard deviations is 155."""
    counts = torch.histc(uniforms()[:, 0].float(), bins=100, min=0, max=1)
    assert ((counts - N / 100) ** 2 / (N / 100)).sum() < 155


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"step": 1}, {"position": 1}, {"rows": torch.arange(1, N + 1)}, {"step": -1}, {"seed": 2**31}],
    ids=["seed", "step", "position", "row", "evaluation", "large seed"],
)
def test_noise_is_independent_of_its_neighbour(changes):
    a, b = uniforms()[:, 0], uniforms(**changes)[:, 0]
    assert abs(correlation(a, b)) < 4 / N**0.5
    assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < 4 / N**0.5  # nor in magnitude


def test_noise_is_independent_across_the_vocabulary():
    both = uniforms()
    assert abs(correlation(both[:, 0], both[:, 1])) < 4 / N**0.5


# ---------------------------------------------------------------- the draws


def draws(logits, *, rows=None, position=0, seed=0, step=0, temperature=1.0):
    rows = torch.arange(N) if rows is None else rows
    sampler = rollout.StatelessSampler(rows, position, seed=seed, step=step, temperature=temperature)
    perturbed = sampler(None, logits.expand(len(rows), -1))
    assert (perturbed.argmax(dim=-1) == sampler.tokens[0]).all()  # what `generate` will take
    return sampler.tokens[0]


LOGITS = torch.tensor([1.0, 0.5, 0.0, -1.0, -1.5, 2.0, -1.8, 0.1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(temperature):
    """Chi-square with 7 degrees of freedom; 99.99 % lie below 29.9."""
    expected = torch.softmax(LOGITS / temperature, dim=0) * N
    counts = torch.bincount(draws(LOGITS, temperature=temperature), minlength=8)
    assert (expected > 20).all()
    assert ((counts - expected) ** 2 / expected).sum() < 29.9


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"step": 1}, {"position": 1}, {"rows": torch.arange(1, N + 1)}],
    ids=["seed", "step", "position", "row"],
)
def test_draws_are_independent(changes):
    """Contingency table of draws and their neighbours: (4 - 1)^2 = 9 degrees of freedom, 99.99 % below 33.7."""
    logits = torch.tensor([0.5, 0.0, -0.5, -1.0])
    joint = torch.bincount(draws(logits) * 4 + draws(logits, **changes), minlength=16).view(4, 4).double()
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / N
    assert ((joint - expected) ** 2 / expected).sum() < 33.7


def test_record_of_a_draw():
    """log p, entropy and self-certainty of the drawn token, by loops; temperature included."""
    logits = 2 * torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    sampler = rollout.StatelessSampler(torch.arange(50), 0, seed=0, step=0, temperature=0.7, collision=True)
    sampler(None, logits)
    for b in range(50):
        weights = [math.exp(z / 0.7) for z in logits[b].tolist()]
        probs = [w / sum(weights) for w in weights]
        entropy = -sum(p * math.log(p) for p in probs)
        expected = {
            "logprobs": math.log(probs[sampler.tokens[0][b]]),
            "entropy": entropy,
            "self_certainty": sum(1 / 9 * math.log((1 / 9) / p) for p in probs),  # KL(uniform || policy)
            "collision": sum(p**2 * (math.log(p) + entropy) for p in probs),
        }
        for name, values in sampler.record.items():
            assert values[0][b].item() == pytest.approx(expected[name], abs=1e-5), name


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_same_completions_however_batched_split_or_ordered(architecture, prompts):
    model = tiny_model(architecture)
    whole = sample(model, prompts)
    assert len({len(row) for row in rows_of(whole)}) > 3  # unequal lengths, or the test shows little
    assert 0 < whole.stopped.sum() < len(prompts)
    for changes in ({"batch_size": 5}, {"batch_size": 1}, {"segment": 1}, {"segment": 7, "batch_size": 4}):
        other = sample(model, prompts, **changes)
        assert rows_of(other) == rows_of(whole), changes
        torch.testing.assert_close(other.logprobs, whole.logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.entropy, whole.entropy, rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_equals_recomputed(architecture, temperature, prompts):
    """What the sampler records (left-padded, cached) is what the trainer scores (right-padded, no cache)."""
    model = tiny_model(architecture)
    result = sample(model, prompts, temperature=temperature, segment=6)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [4, 9], [11]):
        tokens, predicts = result.pack(rows)
        with torch.no_grad():
            logits = model.get_output_embeddings()(models.hidden_states(model, tokens)[predicts])
        mask = result.mask[rows]
        logprobs = grpo.token_logprobs(logits, result.tokens[rows][mask], temperature=temperature)
        torch.testing.assert_close(logprobs, result.logprobs[rows][mask], rtol=0, atol=1e-4)
        entropy = grpo.token_entropy(logits, temperature=temperature)
        torch.testing.assert_close(entropy, result.entropy[rows][mask], rtol=0, atol=1e-4)


def test_sum_of_logprobs_is_the_sequence_likelihood(model, prompts):
    """Each row alone, unpadded, through the model's own loss: catches an off-by-one in either alignment."""
    result = sample(model, prompts)
    for b, prompt in enumerate(prompts):
        completion = result.tokens[b][result.mask[b]].tolist()
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            nll = model(ids, labels=labels).loss.item() * len(completion)
        assert -result.logprobs[b].sum().item() == pytest.approx(nll, abs=1e-3)


def test_mask_is_up_to_and_including_the_first_stop_token(model, prompts):
    # Prompts that hold stop tokens and zeros themselves: still attended, and no part of any mask.
    prompts = [[1, *prompt, 5, 0, 2] for prompt in prompts]
    result = sample(model, prompts)
    for b in range(len(prompts)):
        row = result.tokens[b][result.mask[b]].tolist()
        assert result.mask[b].long().diff().max() <= 0  # one run of True, from the start
        assert not set(row[:-1]) & set(STOP)
        if result.stopped[b]:
            assert row[-1] in STOP
        else:
            assert row[-1] not in STOP and len(row) == 20
        assert (result.tokens[b][~result.mask[b]] == 0).all() and (result.logprobs[b][~result.mask[b]] == 0).all()
        assert (result.logprobs[b][result.mask[b]] < 0).all()
    assert result.lengths.tolist() == [len(row) for row in rows_of(result)]
    assert {row[-1] for row in rows_of(result)} >= set(STOP)  # both stop ids end rows


def test_token_zero_may_be_a_stop_id(model, prompts):
    """pad id == stop id == 0, as when pad is eos: masks come from positions."""
    result = sample(model, prompts, stop=[0])
    for row, stopped in zip(rows_of(result), result.stopped.tolist()):
        assert (row[-1] == 0) == stopped and 0 not in row[:-1]


def test_the_models_own_generation_config_does_not_leak_in(model, prompts):
    plain = sample(model, prompts)
    own = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0,
                           no_repeat_ngram_size=1, suppress_tokens=list(range(2, 30)), eos_token_id=1)
    model.generation_config = own
    assert rows_of(sample(model, prompts)) == rows_of(plain)
    assert model.generation_config is own  # and it is left as it was


def test_sampling_leaves_training_mode_and_uses_the_cache(model, prompts):
    """With gradient checkpointing a model in train() drops its KV cache; sampling happens in eval()."""
    models.recompute_layers(model)
    model.train()
    widths = []
    hook = model.base_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: widths.append((args or [kwargs["hidden_states"]])[0].shape[1]), with_kwargs=True
    )
    sample(model, prompts)
    hook.remove()
    assert widths[0] == max(map(len, prompts)) - 1 and set(widths[1:]) == {1}
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def passes(model, prompts, **words):
    """The rollout, and (rows, columns) of each forward pass."""
    seen = []

    def note(module, args, kwargs):
        seen.append((args or [kwargs["hidden_states"]])[0].shape[:2])

    hook = model.base_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    result = sample(model, prompts, **words)
    hook.remove()
    return result, seen


def test_finished_rows_leave_the_batch(model, prompts):
    result, (_, *decoded) = passes(model, prompts, segment=2)
    lengths = result.lengths.tolist()
    for position, (rows, columns) in enumerate(decoded):
        alive = sum(length > position - position % 2 for length in lengths)  # swept after every second token
        assert (rows, columns) == (alive, 1)


def test_new_rows_take_the_place_of_finished_ones(model, prompts):
    """Against a simulation by counts alone: 4 places, swept after every 2 tokens."""
    prompts = [*prompts, *prompts]
    result, seen = passes(model, prompts, segment=2, batch_size=4)
    waiting, places, expected = result.lengths.tolist(), [], []
    while waiting or places:
        while waiting and len(places) < 4:
            places.append([waiting.pop(0), 0])
        columns = min(2, 20 - max(drawn for _, drawn in places))
        for _ in range(columns):
            if any(length > drawn for length, drawn in places):  # `generate` stops when all of them have
                expected.append(len(places))
                places = [[length, drawn + 1] for length, drawn in places]
        places = [[length, drawn] for length, drawn in places if length > drawn]
    assert [rows for rows, columns in seen if columns == 1] == expected
    in_batches = sum(max(result.lengths.tolist()[first : first + 4]) for first in range(0, len(prompts), 4))
    assert len(expected) < 0.9 * in_batches


def test_a_prompt_of_a_group_is_read_once(model, prompts):
    groups = [prompt for prompt in prompts for _ in range(8)]
    result, seen = passes(model, groups)
    assert seen[0] == (len(prompts), max(map(len, prompts)) - 1) and len(result.prompts) == 8 * len(prompts)


def test_a_sliding_window_is_sampled_batch_by_batch(prompts):
    """Its cache holds the last columns only: rows leave, none enter; and the record is what the scorer finds."""
    model = tiny_model("mistral", sliding_window=4)
    whole, seen = passes(model, prompts, batch_size=5, segment=3)
    assert rows_of(whole) == rows_of(sample(model, prompts)) and len([1 for _, columns in seen if columns > 1]) == 3
    scored = rollout.rescore(model, whole, config_of(), ALONE)
    torch.testing.assert_close(scored.logprobs, whole.logprobs, rtol=0, atol=1e-4)


def test_temperature_0_is_greedy(model, prompts):
    """Whatever the noise; the record is that of temperature 1."""
    greedy, other = (sample(model, prompts, temperature=0.0, seed=seed) for seed in (0, 1))
    assert rows_of(greedy) == rows_of(other)
    for prompt, row in zip(prompts, rows_of(greedy)):
        ids = torch.tensor([[*prompt, *row]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == list(row)
    scored = rollout.rescore(model, greedy, config_of(), ALONE)
    torch.testing.assert_close(scored.entropy, greedy.entropy, rtol=0, atol=1e-4)


def test_prompts_of_one_token(model):
    """There is nothing to read before the first draw."""
    short = sample(model, [[7], [9], [7], [3, 4, 5]], batch_size=2, segment=3)
    assert rows_of(short) == rows_of(sample(model, [[7], [9], [7], [3, 4, 5]]))
    scored = rollout.rescore(model, short, config_of(), ALONE)
    torch.testing.assert_close(scored.logprobs, short.logprobs, rtol=0, atol=1e-4)


def test_progress_counts_every_completion_once(model, prompts):
    done = []
    sample(model, prompts, segment=3, batch_size=5, progress=done.append)
    assert sum(done) == len(prompts)


def test_uniform_entropy_at_a_blank_model():
    """A sanity check on units: a model with zero weights has entropy log V and self-certainty 0."""
    model = tiny_model(spread=0.0)
    result = sample(model, [[3, 4]] * 4)
    torch.testing.assert_close(result.entropy[result.mask], torch.full_like(result.entropy[result.mask],
                                                                            math.log(VOCABULARY)))
    assert result.self_certainty.abs().max() < 1e-5
