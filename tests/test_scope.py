"""The method in scope.py: scores, selection and the full-vocabulary KL, against slow references."""

import math

import pytest
import torch
from torch.testing import assert_close

from scope import kl_divergence, redistribution_score, select_tokens


def step_of_tokens(n=2000, seed=0, positive=0.5):
    """Make up the flat tokens of a step, as arguments of select_tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=generator)
    entropy = 2 * torch.rand(n, generator=generator)
    advantages = torch.rand(n, generator=generator) * 2.4
    sign = torch.where(torch.rand(n, generator=generator) < positive, 1.0, -1.0)
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "advantages": advantages * sign,
        "entropy_baseline": 0.1 * torch.randn(n, generator=generator),
    }


def select(strategy, step, fraction=0.05, seed=0):
    return select_tokens(strategy, fraction=fraction, seed=seed, **step)


def test_redistribution_score_by_hand():
    probs = torch.tensor([[0.5], [0.9], [1.0]])
    advantages = torch.tensor([2.0, -2.0, 0.0])
    expected = torch.tensor([[0.5, 0, 0], [0.18, 0, 0], [0, 0, 0]])
    assert_close(redistribution_score(probs, advantages), expected)


def test_ties_break_at_random_by_seed():
    half = torch.full((1000,), math.log(0.5))
    step = {"logprobs": half, "entropy": torch.ones(1000), "advantages": torch.ones(1000)}
    masks = torch.stack([select("scope", step, 0.1, seed) for seed in range(40)])
    assert (masks.sum(dim=1) == 100).all()
    assert (masks[0] != masks[1]).any()
    # 40 draws at 10 %: P(>= 16) < 1e-6 a token; always the same tokens would give 40
    assert masks.sum(dim=0).max() < 16


def test_none_all_and_uniform():
    step = step_of_tokens()
    assert not select("none", step).any()
    assert select("all", step).all()
    uniform = select("uniform", step)
    assert uniform.sum() == 100
    assert (uniform != select("uniform", step, seed=1)).any()


# ---------------------------------------------------------------- the KL


def slow_softmax(logits):
    weights = [math.exp(z - max(logits)) for z in logits]
    return [w / sum(weights) for w in weights]


def slow_kl(z, z_ref):
    return sum(p * math.log(p / q) for p, q in zip(slow_softmax(z), slow_softmax(z_ref)))


def test_kl_value_and_gradient():
    """Value against loops; gradient against central differences and pi(v) (log pi(v)/pi_ref(v) -
    D).
    """
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    reference = 3 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reference.requires_grad_()
    divergence = kl_divergence(logits, reference)
    divergence.sum().backward()
    assert reference.grad is None  # the reference is data
    p = torch.softmax(logits.detach(), dim=-1)
    log_ratio = torch.log_softmax(logits.detach(), -1) - torch.log_softmax(reference.detach(), -1)
    expected = p * (log_ratio - divergence.detach()[:, None])
    assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)
    h = 1e-5
    for i in range(6):
        z = logits[i].tolist()
        z_ref = reference[i].tolist()
        assert divergence[i].item() == pytest.approx(slow_kl(z, z_ref), rel=1e-12)
        for v in range(8):
            up = slow_kl([*z[:v], z[v] + h, *z[v + 1 :]], z_ref)
            down = slow_kl([*z[:v], z[v] - h, *z[v + 1 :]], z_ref)
            assert logits.grad[i, v].item() == pytest.approx(
                (up - down) / (2 * h), rel=1e-6, abs=1e-9
            )


def random_logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kl_of_equals_is_zero_without_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    divergence = kl_divergence(logits, logits.detach().clone())
    divergence.sum().backward()
    assert (divergence == 0).all()
    assert logits.grad.abs().max() < 1e-6  # the rounding of softmax's own sum


def test_kl_of_bf16_logits_is_taken_in_fp32():
    logits = random_logits(32, 500, seed=1).bfloat16()
    reference = random_logits(32, 500, seed=2).bfloat16()
    exact = kl_divergence(logits.double(), reference.double())
    assert_close(kl_divergence(logits, reference).double(), exact, rtol=1e-4, atol=1e-5)
