"""grpo.py against hand-computed numbers and slow float64 loops."""

import math

import pytest
import torch

import grpo


def slow_advantages(rewards, group_size, eps):
    result = []
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        mean = sum(group) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (group_size - 1))
        result += [0.0 if max(group) == min(group) else (r - mean) / (std + eps) for r in group]
    return result


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    # mean 0.25, deviations 0.75 and -0.25, std (ddof 1) sqrt(0.75 / 3) = 0.5
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) / 0.5001
    torch.testing.assert_close(grpo.group_advantages(rewards, 4), expected)


@pytest.mark.parametrize(
    "correct, positive", [(1, 2.474), (2, 1.620), (3, 1.207), (4, 0.935), (5, 0.724), (6, 0.540), (7, 0.353)]
)
def test_positive_advantage_of_c_correct_out_of_8(correct, positive):
    rewards = torch.tensor([1.0] * correct + [0.0] * (8 - correct))
    assert grpo.group_advantages(rewards, 8)[0].item() == pytest.approx(positive, abs=1e-3)


def test_advantages_against_loops():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for group_size in (2, 4, 8):
        expected = torch.tensor(slow_advantages(rewards.tolist(), group_size, 1e-4), dtype=torch.float64)
        torch.testing.assert_close(grpo.group_advantages(rewards, group_size), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e8 / 3])
def test_equal_rewards_give_exactly_zero(value):
    """0.1 averaged in fp32 is not 0.1: without the rule the rest would be noise divided by eps."""
    assert (grpo.group_advantages(torch.full((7,), value), 7) == 0).all()


@pytest.mark.parametrize("rewards, size", [(torch.ones(4), 1), (torch.ones(5), 2), (torch.ones(2, 2), 2)])
def test_advantages_refuse(rewards, size):
    with pytest.raises(ValueError, match="group"):
        grpo.group_advantages(rewards, size)


def slow_policy_loss(logprob, old, advantage, low, high):
    ratio = math.exp(logprob - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, clipped * advantage)


def test_policy_loss_value_and_gradient_against_loops():
    generator = torch.Generator().manual_seed(2)
    logprobs = -torch.rand(200, generator=generator, dtype=torch.float64)
    old = logprobs + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    loss = grpo.policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    clipped = grpo.clipped(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    for i in range(200):
        x, o, a = logprobs[i].item(), old[i].item(), advantages[i].item()
        assert loss[i].item() == pytest.approx(slow_policy_loss(x, o, a, 0.2, 0.28), rel=1e-12)
        h = 1e-6
        slope = (slow_policy_loss(x + h, o, a, 0.2, 0.28) - slow_policy_loss(x - h, o, a, 0.2, 0.28)) / (2 * h)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert clipped[i].item() == (abs(slope) < 1e-12)
    assert 0 < clipped.sum() < 200


def test_policy_loss_on_policy_by_hand():
    """A 2 x 3 batch: rho = 1, so the value is -A and the gradient with respect to log p is -A."""
    advantages = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5, -0.5], requires_grad=True)
    logprobs = torch.tensor([-0.1, -1.0, -2.0, -0.3, -3.0, -0.7], requires_grad=True)
    loss = grpo.policy_loss(logprobs, logprobs.detach(), advantages)
    assert loss.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 0.5]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 0.5]
    assert advantages.grad is None  # advantages are data


def test_token_logprobs_and_entropy_against_loops():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4
    tokens = torch.tensor([0, 8, 3, 3, 5])
    for temperature in (1.0, 0.7):
        logprobs = grpo.token_logprobs(logits, tokens, temperature=temperature)
        entropy = grpo.token_entropy(logits, temperature=temperature)
        for i in range(5):
            weights = [math.exp(z / temperature) for z in logits[i].tolist()]
            probs = [w / sum(weights) for w in weights]
            assert logprobs[i].item() == pytest.approx(math.log(probs[tokens[i]]), rel=1e-12)
            assert entropy[i].item() == pytest.approx(-sum(p * math.log(p) for p in probs), rel=1e-12)


def test_bf16_logits_are_scored_in_fp32():
    logits = (torch.randn(64, 1000, generator=torch.Generator().manual_seed(4)) * 3).bfloat16()
    exact = torch.log_softmax(logits.double(), dim=-1)[:, 0]
    logprobs = grpo.token_logprobs(logits, torch.zeros(64, dtype=torch.long), temperature=1.0)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_chunks_equal_the_whole_in_value_and_gradient(size):
    """Chunked with recomputation == logits of all tokens at once, also for the weights used in every chunk."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(11, (17,), generator=generator)

    def logprobs_of(hidden, tokens):
        return grpo.token_logprobs(hidden @ weight.T, tokens, temperature=0.8)

    factors = torch.randn(17, generator=generator, dtype=torch.float64)
    whole, chunked = logprobs_of(hidden, tokens), grpo.in_chunks(logprobs_of, hidden, tokens, size=size)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad((whole * factors).sum(), (hidden, weight)),
                    torch.autograd.grad((chunked * factors).sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_chunks_never_hold_all_logits():
    """No tensor that autograd keeps for backward has a row of logits for more than one chunk of tokens."""
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    kept, made = [], []

    def logprobs_of(hidden, tokens):
        logits = hidden @ weight.T
        made.append(len(logits))
        return grpo.token_logprobs(logits, tokens, temperature=1.0)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        grpo.in_chunks(logprobs_of, hidden, torch.zeros(64, dtype=torch.long), size=8).sum().backward()
    assert made == [8] * 16  # eight chunks, each once forward and once again in backward
    assert not [shape for shape in kept if len(shape) == 2 and shape[1] == 50 and shape[0] > 8]
