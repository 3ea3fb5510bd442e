"""SCOPE: find the few tokens that drive entropy collapse, and make only those pay a KL penalty.

The method is three functions. `redistribution_score` scores every sampled token (Eq. 11),
`select_tokens` takes the share q of the step's tokens with the highest score (Eq. 12-13), and
`kl_divergence` is the penalty that these tokens pay (Eq. 14-15). Below them, `decompose` and its
helpers show where the score comes from: Proposition 1, S_v = L_v + R_v, and the identities of
Appendix A. What goes beyond the paper comes last.

Equation numbers are those of "A Few Bad Apples Spoil the Bunch" (ACL Findings 2026). N is the
number of completion tokens of a whole optimizer step, over all ranks. Vectors [N] are flat:
they hold no padding, so nothing is masked here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------- the method


def redistribution_score(probs: Tensor, advantages: Tensor) -> Tensor:
    """Score sampled tokens by s = p (1 - p) max(A, 0).  Shapes may broadcast.  Eq. 11, 48

    >>> redistribution_score(torch.tensor([0.5, 0.5, 0.9]), torch.tensor([2.0, -2.0, 2.0]))
    tensor([0.5000, 0.0000, 0.1800])
    """
    return probs * (1 - probs) * advantages.clamp(min=0)


def covariance_score(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Score tokens by (log p - mean log p) (A - mean A), means over the step.  [N] -> [N]

    KL-Cov, Cui et al. 2025.
    """
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def select_tokens(
    strategy: str,
    *,
    fraction: float,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    seed: int,
    forking_fraction: float = 0.2,
    entropy_baseline: Tensor | None = None,
) -> Tensor:
    """Select which of the step's N valid tokens pay the KL penalty.  [N], [N], [N] -> bool [N]

    Of the strategy's candidates, the K = round(fraction * N) with the highest score are selected,
    or K at random if the strategy has no score. If there are fewer than K candidates, all are
    selected. Ties are broken at random. Random choices depend on `seed` only, so the same arguments
    give the same selection. Forking tokens are the share `forking_fraction` of tokens with the
    highest entropy. `entropy_baseline` is only for the strategy beyond the paper.

    This departs from Eq. 13 in one point. Eq. 13 selects every token with s >= the (1 -
    q)-quantile, and when fewer than q N tokens have s > 0 that quantile is 0, so that *all* tokens
    would be selected. Here only tokens with s > 0 are candidates, and never more than K are
    selected.
    """
    record = STRATEGIES[strategy]
    n = logprobs.numel()
    # One random order of the tokens breaks all ties. It is drawn on the CPU, so every device gets
    # the same order.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(logprobs.device)
    entropy = entropy.detach()
    forking = top_k(
        entropy, torch.ones_like(entropy, dtype=torch.bool), round(forking_fraction * n), order
    )
    tokens = StepTokens(logprobs.detach(), entropy, advantages.detach(), forking, entropy_baseline)
    if record.fraction is not None:
        fraction = record.fraction
    score = torch.zeros_like(tokens.logprobs)
    if record.score is not None:
        score = record.score(tokens)
    return top_k(score, record.candidates(tokens), round(fraction * n), order)


def top_k(score: Tensor, candidates: Tensor, k: int, order: Tensor) -> Tensor:
    """Mark the k candidates with the highest score, ties broken by `order`.  All [N]"""
    order = order[candidates[order]]
    ranking = order[score[order].sort(descending=True, stable=True).indices]
    selected = torch.zeros_like(candidates)
    selected[ranking[:k]] = True
    return selected


def kl_divergence(logits: Tensor, reference_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the full-vocabulary KL(policy || reference) in nats.  [.., V] -> [..]  Eq. 14

    The sum runs over the whole vocabulary. An estimate from the sampled token would be biased,
    because that same token decided whether the position was selected. The gradient with respect to
    logit v is pi(v) (log pi(v)/pi_ref(v) - KL) / temperature; the reference gets no gradient. bf16
    logits are converted to fp32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    log_ref = torch.log_softmax(reference_logits.detach().to(dtype) / temperature, dim=-1)
    return (logp.exp() * (logp - log_ref)).sum(dim=-1)


# ---------------------------------------------------------------- strategies: the rows of Table 1


class StepTokens(NamedTuple):
    """Holds what a strategy may look at, as vectors [N] of the step's tokens."""

    logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    forking: Tensor  # bool: the tokens with the highest entropy
    entropy_baseline: Tensor | None


class Strategy(NamedTuple):
    """Describes one selection strategy."""

    candidates: Callable[[StepTokens], Tensor]  # which tokens may be selected, bool [N]
    score: Callable[[StepTokens], Tensor] | None = None  # [N], highest first; None: at random
    fraction: float | None = None  # a fixed share of the tokens, instead of selection.fraction

    @property
    def selects(self) -> bool:
        return self.fraction != 0


def every_token(tokens: StepTokens) -> Tensor:
    return torch.ones_like(tokens.forking)


def scope_score(tokens: StepTokens) -> Tensor:
    return redistribution_score(tokens.logprobs.exp(), tokens.advantages)


STRATEGIES = {
    "none": Strategy(every_token, fraction=0.0),  # plain GRPO
    "uniform": Strategy(every_token),
    "positive": Strategy(lambda tokens: tokens.advantages > 0),
    "forking": Strategy(lambda tokens: tokens.forking),
    "forking_positive": Strategy(lambda tokens: tokens.forking & (tokens.advantages > 0)),
    "non_forking": Strategy(lambda tokens: ~tokens.forking),
    "covariance": Strategy(
        every_token, lambda tokens: covariance_score(tokens.logprobs, tokens.advantages)
    ),
    "scope": Strategy(lambda tokens: scope_score(tokens) > 0, scope_score),
    "all": Strategy(every_token, fraction=1.0),  # the usual KL penalty on every token
}


# ------------------------------------------- where the score comes from: Section 3.2 and Appendix A
#
# One context, one softmax p over V tokens. alpha_v = E[|A| given y = v] >= 0 is the mean advantage
# magnitude of the trajectories that continue with token v. Everything below is exact: no
# expectation is sampled. Sums over the *other* tokens are added up without token v. Subtracting
# its term from the total would leave no correct digit when p_v is near 1.


def over_others(values: Tensor) -> Tensor:
    """Return sum_{u != v} values_u for every v, without subtraction.  [.., V] -> [.., V]"""
    zero = torch.zeros_like(values[..., :1])
    before = torch.cat([zero, values[..., :-1].cumsum(-1)], dim=-1)
    after = torch.cat([values[..., 1:].flip(-1).cumsum(-1).flip(-1), zero], dim=-1)
    return before + after


def score_jacobian(probs: Tensor) -> Tensor:
    """Return d log p(y) / d z_v = 1[y = v] - p_v for all y (rows), v (columns).  Prop. 2, Eq. 20"""
    return torch.eye(len(probs), dtype=probs.dtype, device=probs.device) - probs


def conditional_score(probs: Tensor, mean_advantage: Tensor) -> Tensor:
    """Return g_v = E[A (1[y = v] - p_v)] = Cov(A, 1[y = v]).  [.., V]  Prop. 3, Eq. 22

    mean_advantage_v = E[A given y = v] is signed, while alpha_v is the mean magnitude.
    """
    return coupling(probs, mean_advantage)


def advantage_scale(probs: Tensor, alpha: Tensor) -> Tensor:
    """Return A_scale = E|A| = sum_u p_u alpha_u.  [.., V], [.., V] -> [.., 1]  Eq. 30"""
    return (probs * alpha).sum(dim=-1, keepdim=True)


def mean_without(probs: Tensor, alpha: Tensor) -> Tensor:
    """Return beta_v = E[|A| given y != v].  [.., V] -> [.., V]  Eq. 25, 29

    beta_v = sum_{u != v} p_u alpha_u / (1 - p_v).
    """
    return over_others(probs * alpha) / over_others(probs)


def deviation(probs: Tensor, alpha: Tensor) -> Tensor:
    """Return delta_v = alpha_v - A_scale.  [.., V] -> [.., V]  Def. 7, Eq. 41

    delta_v = (1 - p_v) (alpha_v - beta_v).
    """
    return over_others(probs) * alpha - over_others(probs * alpha)


def coupling(probs: Tensor, alpha: Tensor) -> Tensor:
    """Return Cov(|A|, 1[y = v]) = p_v delta_v.  [.., V] -> [.., V]  Eq. 40, 42

    It is p_v (1 - p_v) (alpha_v - beta_v).
    """
    return probs * deviation(probs, alpha)


class Decomposition(NamedTuple):
    """S = L + R for every token; see `decompose`."""

    S: Tensor
    L: Tensor
    R: Tensor


def decompose(probs: Tensor, abs_advantage: Tensor, *, eta: float = 1.0) -> Decomposition:
    """Compute Proposition 1 exactly: how far one update pushes each logit v, and why.

    S_v = E|Delta_v| = eta p_v (1 - p_v) (alpha_v + beta_v)   the whole push     Prop. 4, Eq. 27
    L_v = 2 eta A_scale p_v (1 - p_v)                         in the score       Eq. 8, 45
    R_v = eta (1 - 2 p_v) Cov(|A|, 1[y = v])                  not in the score   Eq. 9, 44, 46

    S is computed from its own definition and not as L + R, so that S = L + R (Eq. 47) can be
    checked. probs [.., V] sums to 1 over V; abs_advantage [.., V] is alpha_v >= 0. Use float64 for
    tight checks.

    >>> S, L, R = decompose(torch.tensor([0.7, 0.3]), torch.tensor([1.0, 3.0]))
    >>> S, L + R
    (tensor([0.8400, 0.8400]), tensor([0.8400, 0.8400]))
    """
    others = over_others(probs)  # 1 - p_v
    S = eta * probs * (others * abs_advantage + over_others(probs * abs_advantage))
    L = 2 * eta * advantage_scale(probs, abs_advantage) * probs * others
    R = eta * (1 - 2 * probs) * coupling(probs, abs_advantage)
    return Decomposition(S, L, R)


def residual_ratio(probs: Tensor, abs_advantage: Tensor) -> Tensor:
    """Return |R_v| / L_v, how much the score leaves out.  Eq. 52, 53

    It is |1 - 2 p_v| |alpha_v - beta_v| / (2 A_scale).
    """
    alpha_minus_beta = abs_advantage - mean_without(probs, abs_advantage)
    return (
        (1 - 2 * probs).abs() * alpha_minus_beta.abs() / (2 * advantage_scale(probs, abs_advantage))
    )


# ---------------------------------------------------------------- beyond the paper


def entropy_change_score(
    logprobs: Tensor, entropy: Tensor, advantages: Tensor, entropy_baseline: Tensor
) -> Tensor:
    """Score tokens by the entropy that their policy gradient takes away.  All [N] -> [N]

    A step of size eta along A (1[y] - pi) changes the entropy at this token's context by dH = -eta
    A [p_y (log p_y + H) - sum_v pi(v)^2 (log pi(v) + H)]. The score is -dH / eta, and
    `entropy_baseline` is the sum over v. p (1 - p) cannot tell p from 1 - p, but this score can:
    reinforcing a token that is rarer than e^-H raises the entropy, and its score is negative.
    """
    return advantages * (logprobs.exp() * (logprobs + entropy) - entropy_baseline)


def step_entropy_change(tokens: StepTokens) -> Tensor:
    return entropy_change_score(
        tokens.logprobs, tokens.entropy, tokens.advantages, tokens.entropy_baseline
    )


STRATEGIES |= {
    "entropy_change": Strategy(lambda tokens: step_entropy_change(tokens) > 0, step_entropy_change)
}
