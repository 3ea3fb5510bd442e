"""GRPO's functions against hand-computed numbers and slow float64 loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from grpo import clipped, group_advantages, in_chunks, policy_loss, ratio, token_logprobs


def float64(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slow_advantages(rewards, group_size, eps):
    result = []
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        mean = sum(group) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (group_size - 1))
        result += [(r - mean) / (std + eps) for r in group]
    return result


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_advantages_against_loops(group_size):
    rewards = float64(24, seed=1)
    expected = torch.tensor(
        slow_advantages(rewards.tolist(), group_size, 1e-4), dtype=torch.float64
    )
    assert_close(group_advantages(rewards, group_size), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e8 / 3])
def test_equal_rewards_give_exactly_zero(value):
    """0.1 averaged in fp32 is not 0.1: without the rule the rest would be noise divided by eps."""
    assert (group_advantages(torch.full((7,), value), 7) == 0).all()


def slow_policy_loss(logprob, old, advantage, low, high):
    rho = math.exp(logprob - old)
    inside = min(max(rho, 1 - low), 1 + high)
    return -min(rho * advantage, inside * advantage)


def test_policy_loss_value_and_gradient_against_loops():
    logprobs = -float64(200, seed=2).abs()
    old = logprobs + 0.5 * float64(200, seed=3)
    advantages = float64(200, seed=4)
    logprobs.requires_grad_()
    loss = policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    mask = clipped(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    h = 1e-6
    for i in range(200):
        x = logprobs[i].item()
        rest = (old[i].item(), advantages[i].item(), 0.2, 0.28)
        slope = (slow_policy_loss(x + h, *rest) - slow_policy_loss(x - h, *rest)) / (2 * h)
        assert loss[i].item() == pytest.approx(slow_policy_loss(x, *rest), rel=1e-12)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert mask[i].item() == (abs(slope) < 1e-12)
    assert 0 < mask.sum() < 200


def test_policy_loss_on_policy_by_hand():
    """A 2 x 3 batch: rho = 1, so the value is -A and the gradient with respect to log p is -A."""
    advantages = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5, -0.5], requires_grad=True)
    logprobs = torch.tensor([-0.1, -1.0, -2.0, -0.3, -3.0, -0.7], requires_grad=True)
    loss = policy_loss(logprobs, logprobs.detach(), advantages)
    assert loss.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 0.5]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 0.5]
    assert advantages.grad is None  # advantages are data


def test_old_logprobs_are_data():
    """Even if they come with a gradient: with old = new the gradient of rho is rho, and not 0."""
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    ratio(logprobs, logprobs).sum().backward()
    assert logprobs.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_against_loops(temperature):
    logits = 4 * float64(5, 9, seed=3)
    tokens = torch.tensor([0, 8, 3, 3, 5])
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    for i in range(5):
        weights = [math.exp(z / temperature) for z in logits[i].tolist()]
        probs = [w / sum(weights) for w in weights]
        assert logprobs[i].item() == pytest.approx(math.log(probs[tokens[i]]), rel=1e-12)


def test_bf16_logits_are_scored_in_fp32():
    logits = (3 * float64(64, 1000, seed=4)).bfloat16()
    exact = torch.log_softmax(logits.double(), dim=-1)[:, 0]
    logprobs = token_logprobs(logits, torch.zeros(64, dtype=torch.long), temperature=1.0)
    assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


def test_chunks_equal_the_whole_in_value_and_gradient():
    """Also for the weights, which are used in every chunk."""
    hidden = float64(17, 6, seed=5).requires_grad_()
    weight = float64(11, 6, seed=6).requires_grad_()
    tokens = torch.arange(17) % 11
    factors = float64(17, seed=7)

    def logprobs_of(hidden, tokens):
        return token_logprobs(hidden @ weight.T, tokens, temperature=0.8)

    whole = logprobs_of(hidden, tokens)
    chunked = in_chunks(logprobs_of, hidden, tokens, size=7)
    assert_close(chunked, whole, rtol=1e-13, atol=0)
    expected = torch.autograd.grad((whole * factors).sum(), (hidden, weight))
    gradient = torch.autograd.grad((chunked * factors).sum(), (hidden, weight))
    assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_chunks_never_hold_all_logits():
    """Autograd saves no logits of more tokens than one chunk has."""
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    saved = []
    sizes = []

    def logprobs_of(hidden, tokens):
        logits = hidden @ weight.T
        sizes.append(len(logits))
        return token_logprobs(logits, tokens, temperature=1.0)

    def save(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        tokens = torch.zeros(64, dtype=torch.long)
        in_chunks(logprobs_of, hidden, tokens, size=8).sum().backward()
    assert sizes == [8] * 16  # eight chunks, each once in forward and once again in backward
    assert not [shape for shape in saved if shape[1:] == (50,) and shape[0] > 8]
