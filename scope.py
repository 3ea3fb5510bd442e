"""SCOPE: which tokens drive entropy collapse, and a KL penalty on just those.

The method is three functions: `redistribution_score` ranks tokens (Eq. 11), `select_tokens` takes the
top q of the step (Eq. 12-13), `kl_divergence` is what they pay (Eq. 14-15). Below them, `decompose` and its
helpers state where the score comes from: Proposition 1, S_v = L_v + R_v, and the identities of Appendix A.

Equation numbers are those of "A Few Bad Apples Spoil the Bunch" (ACL Findings 2026). N counts the valid
completion tokens of a whole optimizer step, over all ranks: flat vectors, so no padding to mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------- the method


def redistribution_score(probs: Tensor, advantages: Tensor) -> Tensor:
    """s = p (1 - p) [A]+ for sampled tokens of probability p; any broadcastable shapes.  Eq. 11, 48

    >>> redistribution_score(torch.tensor([0.5, 0.5, 0.9]), torch.tensor([2.0, -2.0, 2.0]))
    tensor([0.5000, 0.0000, 0.1800])
    """
    return probs * (1 - probs) * advantages.clamp(min=0)


def select_tokens(
    strategy: str, *, fraction: float, logprobs: Tensor, entropy: Tensor, advantages: Tensor, seed: int
) -> Tensor:
    """Which of the step's N valid tokens pay the KL penalty.  [N], [N], [N] -> bool [N]

    The budget is K = round(fraction * N). Each strategy gives its tokens a priority and a candidate set;
    the K candidates of highest priority are taken, or all of them if there are fewer. Ties are broken at
    random by `seed`, and the same arguments always give the same mask.

    One departure from Eq. 13: `s >= quantile` selects *every* token when fewer than q of them have s > 0
    (the quantile is 0). Here only s > 0 can be selected, and the count is K exactly (METHODS: README).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}: give a share of the tokens, 0 to 1")
    if not logprobs.shape == entropy.shape == advantages.shape or logprobs.ndim != 1:
        raise ValueError(f"need flat vectors of one length, got logprobs {tuple(logprobs.shape)}, "
                         f"entropy {tuple(entropy.shape)}, advantages {tuple(advantages.shape)}")
    priority, candidate = STRATEGIES[strategy](logprobs.detach(), entropy.detach(), advantages.detach())
    budget = logprobs.numel() if strategy == "all" else round(fraction * logprobs.numel())

    # A stable sort of shuffled tokens: equal priorities stay in random order. CPU: one stream for all devices.
    shuffle = torch.randperm(logprobs.numel(), generator=torch.Generator().manual_seed(seed)).to(logprobs.device)
    shuffle = shuffle[candidate[shuffle]]
    best = shuffle[priority[shuffle].sort(descending=True, stable=True).indices[:budget]]
    selected = torch.zeros_like(candidate)
    selected[best] = True
    return selected


def _scope(logprobs, entropy, advantages):
    score = redistribution_score(logprobs.exp(), advantages)
    return score, score > 0


def _uniform(logprobs, entropy, advantages):
    return torch.zeros_like(logprobs), torch.ones_like(logprobs, dtype=torch.bool)


def _none(logprobs, entropy, advantages):
    return torch.zeros_like(logprobs), torch.zeros_like(logprobs, dtype=torch.bool)


# Each: (logprobs, entropy, advantages), all [N] -> (priority [N], candidate bool [N]).
STRATEGIES = {
    "none": _none,  # plain GRPO
    "uniform": _uniform,  # K tokens at random
    "scope": _scope,  # the K largest redistribution scores among s > 0
    "all": _uniform,  # every token, whatever `fraction` says: the dense penalty
}


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Full-vocabulary D = KL(policy || reference) at each position, nats.  [.., V], [.., V] -> [..]  Eq. 14

    Over the whole vocabulary, not the sampled token: the choice of a token depends on which token was
    sampled, and an estimate from that same sample (k3) is then biased. fp32 or better. The gradient with
    respect to logit v is pi(v) (log pi(v)/pi_ref(v) - D); the reference gets none.
    """
    low = (torch.bfloat16, torch.float16)
    logits = logits.float() if logits.dtype in low else logits
    reference_logits = reference_logits.float() if reference_logits.dtype in low else reference_logits
    logp = torch.log_softmax(logits, dim=-1)
    log_ref = torch.log_softmax(reference_logits.detach(), dim=-1)
    return (logp.exp() * (logp - log_ref)).sum(dim=-1)


# ------------------------------------------- where the score comes from: Section 3.2 and Appendix A
#
# One context, one softmax p over V tokens. alpha_v = E[|A| given y = v] >= 0 is the mean advantage magnitude
# of the trajectories that go on with token v. Everything below is exact: no expectation is sampled.
# Sums "over the others" are taken without the token itself, not as total minus own: at p_v near 1 that
# difference would keep no correct digit.


def over_others(values: Tensor) -> Tensor:
    """sum_{u != v} values_u for every v, without subtraction.  [.., V] -> [.., V]"""
    zero = torch.zeros_like(values[..., :1])
    before = torch.cat([zero, values[..., :-1].cumsum(-1)], dim=-1)
    after = torch.cat([values[..., 1:].flip(-1).cumsum(-1).flip(-1), zero], dim=-1)
    return before + after


def score_jacobian(probs: Tensor) -> Tensor:
    """d log p(y) / d z_v = 1[y = v] - p_v for every y (rows) and v (columns).  [V] -> [V, V]  Prop. 2, Eq. 20"""
    return torch.eye(len(probs), dtype=probs.dtype, device=probs.device) - probs


def conditional_score(probs: Tensor, mean_advantage: Tensor) -> Tensor:
    """g_v = E[A (1[y = v] - p_v)] = Cov(A, 1[y = v]), mean_advantage_v = E[A given y = v], signed.  Prop. 3, Eq. 22"""
    return coupling(probs, mean_advantage)


def advantage_scale(probs: Tensor, alpha: Tensor) -> Tensor:
    """A_scale = E|A| = sum_u p_u alpha_u.  [.., V], [.., V] -> [.., 1]  Eq. 30"""
    return (probs * alpha).sum(dim=-1, keepdim=True)


def mean_without(probs: Tensor, alpha: Tensor) -> Tensor:
    """beta_v = E[|A| given y != v] = sum_{u != v} p_u alpha_u / (1 - p_v).  [.., V] -> [.., V]  Eq. 25, 29"""
    return over_others(probs * alpha) / over_others(probs)


def deviation(probs: Tensor, alpha: Tensor) -> Tensor:
    """delta_v = alpha_v - A_scale = (1 - p_v) (alpha_v - beta_v).  [.., V] -> [.., V]  Def. 7, Eq. 41"""
    return over_others(probs) * alpha - over_others(probs * alpha)


def coupling(probs: Tensor, alpha: Tensor) -> Tensor:
    """Cov(|A|, 1[y = v]) = p_v delta_v = p_v (1 - p_v) (alpha_v - beta_v).  [.., V] -> [.., V]  Eq. 40, 42"""
    return probs * deviation(probs, alpha)


class Decomposition(NamedTuple):
    """S = L + R for every token; see `decompose`."""

    S: Tensor
    L: Tensor
    R: Tensor


def decompose(probs: Tensor, abs_advantage: Tensor, *, eta: float = 1.0) -> Decomposition:
    """Proposition 1, exact: how far one update is expected to push the logit of each token v, and why.

    S_v = E|Delta_v| = eta p_v (1 - p_v) (alpha_v + beta_v)    expected magnitude of the push    Prop. 4, Eq. 27
    L_v = 2 eta A_scale p_v (1 - p_v)                          geometry: what SCOPE's score keeps      Eq. 8, 45
    R_v = eta (1 - 2 p_v) Cov(|A|, 1[y = v])                   coupling: what it drops             Eq. 9, 44, 46

    S is computed from its own definition, not as L + R, so that S = L + R (Eq. 47) is a fact to check.
    probs [.., V] sums to 1 over V, abs_advantage [.., V] is alpha_v >= 0; use float64 for tight checks.

    >>> S, L, R = decompose(torch.tensor([0.7, 0.3]), torch.tensor([1.0, 3.0]))
    >>> S, L + R
    (tensor([0.8400, 0.8400]), tensor([0.8400, 0.8400]))
    """
    if probs.shape != abs_advantage.shape:
        raise ValueError(f"probs {tuple(probs.shape)} and abs_advantage {tuple(abs_advantage.shape)} differ in shape")
    others = over_others(probs)  # 1 - p_v
    S = eta * probs * (others * abs_advantage + over_others(probs * abs_advantage))
    L = 2 * eta * advantage_scale(probs, abs_advantage) * probs * others
    R = eta * (1 - 2 * probs) * coupling(probs, abs_advantage)
    return Decomposition(S, L, R)


def residual_ratio(probs: Tensor, abs_advantage: Tensor) -> Tensor:
    """|R_v| / L_v = |1 - 2 p_v| |alpha_v - beta_v| / (2 A_scale): how loose the score is; 0 at p = 1/2.  Eq. 52, 53"""
    gap = abs_advantage - mean_without(probs, abs_advantage)
    return (1 - 2 * probs).abs() * gap.abs() / (2 * advantage_scale(probs, abs_advantage))
