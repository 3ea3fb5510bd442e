"""scope.py's method: scores, selection and the full-vocabulary KL, against slow references."""

import math

import pytest
import torch

import scope


def step_of_tokens(n=2000, seed=0, positive=0.5):
    """Flat (logprobs, entropy, advantages) of a made-up step."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=generator)
    entropy = 2 * torch.rand(n, generator=generator)
    advantages = torch.rand(n, generator=generator) * 2.4
    sign = torch.where(torch.rand(n, generator=generator) < positive, 1.0, -1.0)
    collision = 0.1 * torch.randn(n, generator=generator)
    gap = torch.randn(n, generator=generator)
    return {"logprobs": logprobs, "entropy": entropy, "advantages": advantages * sign, "collision": collision,
            "gap": gap}


def test_redistribution_score_by_hand():
    probs = torch.tensor([[0.5], [0.9], [1.0]])
    advantages = torch.tensor([2.0, -2.0, 0.0])
    expected = torch.tensor([[0.5, 0, 0], [0.18, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(scope.redistribution_score(probs, advantages), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.2, 0.5])
def test_scope_takes_the_largest_scores(fraction):
    """Against a sorted list; realised q is exactly round(q N) as long as enough tokens have s > 0."""
    step = step_of_tokens()
    selected = scope.select_tokens("scope", fraction=fraction, seed=0, **step)
    scores = [math.exp(lp) * (1 - math.exp(lp)) * max(a, 0)
              for lp, a in zip(step["logprobs"].tolist(), step["advantages"].tolist())]
    ranked = sorted(range(2000), key=lambda i: -scores[i])
    budget = min(round(fraction * 2000), sum(s > 0 for s in scores))
    assert set(selected.nonzero().flatten().tolist()) == set(ranked[:budget])


def test_realised_fraction():
    selected = scope.select_tokens("scope", fraction=0.05, seed=0, **step_of_tokens(n=12345))
    assert abs(selected.sum().item() - 0.05 * 12345) <= 1


def test_fewer_candidates_than_budget_are_all_taken():
    step = step_of_tokens(positive=0.02)
    positive = step["advantages"] > 0
    assert 0 < positive.sum() < 100
    assert (scope.select_tokens("scope", fraction=0.05, seed=0, **step) == positive).all()


def test_all_wrong_selects_nothing():
    """The quantile of all-zero scores is 0, and `s >= 0` would select every token."""
    step = step_of_tokens() | {"advantages": torch.zeros(2000)}
    assert not scope.select_tokens("scope", fraction=0.05, seed=0, **step).any()


def test_ties_break_at_random_by_seed():
    step = {"logprobs": torch.full((1000,), math.log(0.5)), "entropy": torch.ones(1000),
            "advantages": torch.ones(1000)}
    masks = [scope.select_tokens("scope", fraction=0.1, seed=seed, **step) for seed in range(40)]
    assert all(mask.sum() == 100 for mask in masks)
    counts = torch.stack(masks).float().sum(dim=0)
    assert (masks[0] != masks[1]).any()
    assert counts.max() < 16  # 40 draws at 10 %: P(>= 16) < 1e-6 a token; always the same tokens would give 40


def test_same_arguments_same_mask():
    for strategy in scope.STRATEGIES:
        first, second = (scope.select_tokens(strategy, fraction=0.05, seed=3, **step_of_tokens()) for _ in range(2))
        assert (first == second).all()


def test_anchors():
    step = step_of_tokens()
    assert not scope.select_tokens("none", fraction=0.05, seed=0, **step).any()
    assert scope.select_tokens("all", fraction=0.05, seed=0, **step).all()
    uniform = scope.select_tokens("uniform", fraction=0.05, seed=0, **step)
    assert uniform.sum() == 100
    assert (uniform != scope.select_tokens("uniform", fraction=0.05, seed=1, **step)).any()


def test_uniform_penalty_is_the_all_token_penalty_in_expectation():
    divergence = torch.rand(2000, generator=torch.Generator().manual_seed(9)) ** 3
    step = step_of_tokens()
    means = torch.stack([
        divergence[scope.select_tokens("uniform", fraction=0.05, seed=seed, **step)].mean() for seed in range(400)
    ])
    error = means.std() / 400**0.5
    assert abs(means.mean() - divergence.mean()) < 4 * error


@pytest.mark.parametrize("bad", [{"fraction": 1.5}, {"strategy": "best"}, {"logprobs": torch.zeros(3)},
                                 {"strategy": "entropy_change", "collision": None}, {"forking_fraction": 1.0}])
def test_selection_refuses(bad):
    arguments = {"strategy": "scope", "fraction": 0.05, "seed": 0, **step_of_tokens(n=4)} | bad
    with pytest.raises(ValueError):
        scope.select_tokens(arguments.pop("strategy"), **arguments)


def slow_kl(z, z_ref):
    p, q = ([math.exp(x - max(row)) for x in row] for row in (z, z_ref))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_kl_value_and_gradient():
    """Value against loops; gradient against central differences and pi(v) (log pi(v)/pi_ref(v) - D)."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    reference = 3 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reference.requires_grad_()
    divergence = scope.kl_divergence(logits, reference)
    divergence.sum().backward()
    assert reference.grad is None  # the reference is data
    p = torch.softmax(logits.detach(), dim=-1)
    log_ratio = torch.log_softmax(logits.detach(), -1) - torch.log_softmax(reference.detach(), -1)
    torch.testing.assert_close(logits.grad, p * (log_ratio - divergence.detach()[:, None]), rtol=1e-10, atol=1e-13)
    for i in range(6):
        z, z_ref = logits[i].tolist(), reference[i].tolist()
        assert divergence[i].item() == pytest.approx(slow_kl(z, z_ref), rel=1e-12)
        for v in range(8):
            h = 1e-5
            up, down = ([*z[:v], z[v] + sign * h, *z[v + 1 :]] for sign in (1, -1))
            slope = (slow_kl(up, z_ref) - slow_kl(down, z_ref)) / (2 * h)
            assert logits.grad[i, v].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_kl_at_a_temperature_is_that_of_the_divided_logits():
    logits, reference = (torch.randn(4, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    expected = scope.kl_divergence(logits / 0.7, reference / 0.7)
    torch.testing.assert_close(scope.kl_divergence(logits, reference, temperature=0.7), expected)


def test_kl_of_equals_is_zero_without_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    divergence = scope.kl_divergence(logits, logits.detach().clone())
    divergence.sum().backward()
    assert (divergence == 0).all() and logits.grad.abs().max() < 1e-6  # rounding of softmax's own sum


def test_kl_of_bf16_logits_is_taken_in_fp32():
    logits, reference = (torch.randn(32, 500, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    exact = scope.kl_divergence(logits.double(), reference.double())
    torch.testing.assert_close(scope.kl_divergence(logits, reference).double(), exact, rtol=1e-4, atol=1e-5)
