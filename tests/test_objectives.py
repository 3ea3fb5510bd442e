"""Objectives against float64 loops written from their papers, alone and from settings."""

import math
from itertools import product

import pytest
import torch
from helpers import ALONE, assert_same_gradient, config_of, tiny_model
from scenarios import by_length, made_up_prompts, made_up_rollout, moved, step_gradient

from objectives import OBJECTIVES
from scope import select_tokens


def mean(values):
    return sum(values) / len(values)


@pytest.fixture
def strong(monkeypatch):
    """Give the constants of the papers values that show in small batches."""
    constants = {
        "DIV_COEF": 0.4,
        "KL_COV_COEF": 2.0,
        "KL_COV_FRACTION": 0.1,
        "CLIP_COV_FRACTION": 0.2,
        "CLIP_COV_RANGE": (0.05, 5.0),
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"objectives.{name}", value)


# ---------------------------------------------------------------- the tokens that they mark


def test_clip_cov_marks_tokens_in_its_range_that_are_not_clipped(monkeypatch):
    """Only 1 < C < 5, and rho <= 2 where A > 0; round(fraction N) at random, or all if fewer."""
    covariance = torch.linspace(-2, 8, 1001)
    monkeypatch.setattr("objectives.covariance_score", lambda logprobs, advantages: covariance)
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 0.05)
    logprobs = torch.full((1001,), -1.0)
    clipped = torch.arange(1001) % 3 == 0
    tokens = {"logprobs": logprobs, "advantages": torch.ones(1001)}
    old_logprobs = logprobs - clipped.float()
    candidates = {i for i in range(1001) if 1 < covariance[i] < 5 and i % 3}
    seen = set()
    for seed in range(60):
        mask = OBJECTIVES["clip_cov"].token_mask(tokens, old_logprobs, config_of(), seed)
        marked = set(mask.nonzero().flatten().tolist())
        assert len(marked) == 50
        assert marked <= candidates
        seen |= marked
    assert len(seen) > 0.99 * len(candidates)
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 1.0)
    everything = OBJECTIVES["clip_cov"].token_mask(tokens, old_logprobs, config_of(), 0)
    assert set(everything.nonzero().flatten().tolist()) == candidates


def test_clip_cov_draws_other_tokens_than_the_selection(monkeypatch):
    """With the same candidates and seed the two overlap as chance has it, not token for token."""
    tokens = {name: torch.zeros(2000) for name in ("logprobs", "entropy", "advantages")}
    monkeypatch.setattr(
        "objectives.covariance_score", lambda logprobs, advantages: torch.full((2000,), 2.0)
    )
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 0.1)
    mask = OBJECTIVES["clip_cov"].token_mask(tokens, torch.zeros(2000), config_of(), 5)
    uniform = select_tokens("uniform", fraction=0.1, seed=5, **tokens)
    assert mask.sum() == uniform.sum() == 200
    assert (mask & uniform).sum() < 50  # 20 expected


@pytest.mark.parametrize("objective", ["kl_cov", "clip_cov"])
def test_cov_methods_mark_at_least_one_token(monkeypatch, objective):
    monkeypatch.setattr("objectives.CLIP_COV_RANGE", (0.0, 5.0))
    tokens = {}
    for seed, name in enumerate(("logprobs", "entropy", "advantages")):
        tokens[name] = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    mask = OBJECTIVES[objective].token_mask(tokens, tokens["logprobs"], config_of(), 0)
    assert mask.sum() == 1


# ---------------------------------------------------------------- gradients of a whole update


def slow_step_tokens(rollout, policy, reference, on_policy):
    """Return every token of the step, a dictionary each, from float64 logits one row at a time."""
    tokens = []
    for b, prompt in enumerate(rollout.prompts):
        completion = rollout.tokens[b][rollout.mask[b]].tolist()
        ids = torch.tensor([prompt + completion])
        logp = torch.log_softmax(policy(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        with torch.no_grad():
            log_ref = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        for t, y in enumerate(completion):
            p = logp[t].exp()
            now = logp[t, y].item()
            A = rollout.advantages[b].item()
            tokens.append(
                {
                    "row": b,
                    "length": len(completion),
                    "A": A,
                    "logp": logp[t, y],
                    "old": now if on_policy else rollout.logprobs[b, t].item(),
                    "H": -(p * logp[t]).sum().item(),
                    "D": (p * (logp[t] - log_ref[t])).sum(),
                    "s": math.exp(now) * (1 - math.exp(now)) * max(A, 0),
                }
            )
    return tokens


def largest(scores, k):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def slow_marks(tokens, objective):
    """Return the numbers of the tokens that the objective treats specially."""
    N = len(tokens)
    logprobs = [token["logp"].item() for token in tokens]
    advantages = [token["A"] for token in tokens]
    mean_logp = mean(logprobs)
    mean_A = mean(advantages)
    if objective == "forking_rl":
        return largest([token["H"] for token in tokens], round(0.3 * N))
    if objective == "kl_cov":
        scores = [(x - mean_logp) * (A - mean_A) for x, A in zip(logprobs, advantages)]
        return largest(scores, round(0.1 * N))
    if objective == "clip_cov":  # these are drawn at random: the draw is taken over, tested above
        old = torch.tensor([token["old"] for token in tokens])
        columns = {"logprobs": torch.tensor(logprobs), "advantages": torch.tensor(advantages)}
        return OBJECTIVES[objective].token_mask(columns, old, None, 0).nonzero().flatten().tolist()
    return []


@pytest.mark.parametrize(
    "objective, normaliser, on_policy",
    [
        ("grpo", "token", True),
        ("kl_cov", "token", True),
        *product(OBJECTIVES, ("token", "sequence"), [False]),
    ],
)
def test_from_settings_to_gradient(strong, objective, normaliser, on_policy):
    """Steps 5-6 as a whole against loops over float64 logits: marks, weights, ratios, penalty."""
    _, gradient, metrics = step_gradient(
        ALONE,
        f"objective={objective}",
        f"grpo.normaliser={normaliser}",
        "grpo.clip_low=0.05",
        "grpo.clip_high=0.1",
        "forking_fraction=0.3",
        "micro_batch_size=12",
        "logits_chunk=50",
        rewards_of=by_length,
        on_policy=on_policy,
    )
    rollout = made_up_rollout(tiny_model(seed=0), list(range(32)), by_length)
    assert rollout.prompts == made_up_prompts()
    policy = tiny_model(seed=0)
    if not on_policy:
        policy = moved(policy)
    policy.double()
    tokens = slow_step_tokens(rollout, policy, tiny_model(seed=1).double(), on_policy)
    N = len(tokens)
    marked = set(slow_marks(tokens, objective))
    counted = set(range(N))
    if objective == "forking_rl":
        counted = marked
    low, high = {"clip_cov": (0.0, 2.0), "kl_cov": (0.0, math.inf)}.get(objective, (0.95, 1.1))
    loss = 0.0
    num_clipped = 0
    for i, token in enumerate(tokens):
        A = token["A"]
        rho = (token["logp"] - token["old"]).exp()
        num_clipped += bool((A > 0 and rho > high) or (A < 0 and rho < low))
        value = -torch.minimum(rho * A, rho.clamp(low, high) * A)
        if objective == "kl_cov" and i in marked:
            value = value + 2.0 * (token["logp"] - token["old"]).abs()
        if i not in counted or (objective == "clip_cov" and i in marked):
            value = value * 0
        denominator = len(counted)
        if normaliser == "sequence":
            denominator = 32 * max(sum(tokens[j]["row"] == token["row"] for j in counted), 1)
        loss = loss + value / denominator
        if objective == "div" and token["row"] % 3 == 0:  # what made_up_rollout calls correct
            loss = loss + 0.4 * rho * token["logp"] / (token["length"] * 32)
    selected = [
        i for i in largest([token["s"] for token in tokens], round(0.2 * N)) if tokens[i]["s"] > 0
    ]
    penalty = sum(tokens[i]["D"] for i in selected)
    loss = loss + 0.7 * penalty / len(selected)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert metrics["kl/selected"] == pytest.approx(penalty.item() / len(selected), rel=1e-3)
    assert metrics["objective/fraction"] == pytest.approx(len(marked) / N)
    assert metrics["clip_frac"] == pytest.approx(num_clipped / N, abs=1e-6)
    assert on_policy or objective in ("kl_cov", "clip_cov") or num_clipped > 0
    expected = {name: p.grad for name, p in policy.named_parameters()}
    assert_same_gradient(expected, gradient, tolerance=2e-5)
