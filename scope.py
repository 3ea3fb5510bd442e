"""SCOPE: which tokens drive entropy collapse, and a KL penalty on just those.

The method is three functions: `redistribution_score` ranks tokens (Eq. 11), `select_tokens` takes the
top q of the step (Eq. 12-13), `kl_divergence` is what they pay (Eq. 14-15). Below them, `decompose` and its
helpers state where the score comes from: Proposition 1, S_v = L_v + R_v, and the identities of Appendix A.

Equation numbers are those of "A Few Bad Apples Spoil the Bunch" (ACL Findings 2026). N counts the valid
completion tokens of a whole optimizer step, over all ranks: flat vectors, so no padding to mask.
"""

from collections.abc import Callable
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


def covariance_score(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """C = (log p - mean log p) (A - mean A), means over the step's tokens.  [N], [N] -> [N]  KL-Cov, Cui et al. 2025"""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def entropy_change_score(logprobs: Tensor, entropy: Tensor, advantages: Tensor, collision: Tensor) -> Tensor:
    """[-dH/eta]+: how fast a step of size eta along A (1[y] - pi) lowers the entropy at this token's context.

    To first order dH = -eta A [p_y (log p_y + H) - sum_v pi(v)^2 (log pi(v) + H)]; `collision` is that sum. Unlike
    p (1 - p) it is not symmetric: a rewarded token rarer than e^-H raises the entropy and scores 0.  All [N] -> [N]
    """
    return (advantages * (logprobs.exp() * (logprobs + entropy) - collision)).clamp(min=0)


def sibling_gap(tokens: Tensor, mask: Tensor, advantages: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """alpha - beta, estimated from the group: what R = (1 - 2p) p (1 - p) (alpha - beta) lacks (Eq. 9, A.12).

    The siblings of a token are the completions of its problem, its own included, that agree with its own up to it.
    alpha is the mean [A]+ of those that go on with the same token, beta of those that go on with another one. Returns
    the gap [B, C], 0 where nobody goes another way, and where somebody does [B, C] bool. tokens, mask [B, C], A [B].
    """
    tokens, mask = (x.view(-1, group_size, x.shape[1]) for x in (tokens, mask))
    both = mask[:, :, None] & mask[:, None]  # [problems, G, G, C]
    same = (tokens[:, :, None] == tokens[:, None]) & both
    before = torch.cat([torch.ones_like(same[..., :1]), same[..., :-1]], dim=-1).long().cumprod(dim=-1).bool()
    positive = advantages.clamp(min=0).view(-1, 1, group_size, 1)

    def mean_over(siblings):
        return (positive * siblings).sum(dim=2) / siblings.sum(dim=2).clamp(min=1)

    together, apart = before & same, before & both & ~same
    branching = apart.any(dim=2)
    gap = (mean_over(together) - mean_over(apart)) * branching
    return gap.flatten(0, 1), branching.flatten(0, 1)


def recovered_score(probs: Tensor, advantages: Tensor, gap: Tensor) -> Tensor:
    """(L + R) / 2 with the residual estimated: p (1 - p) ([A]+ + (1 - 2p) gap / 2), and no less than 0.  All [N]"""
    return (redistribution_score(probs, advantages) + probs * (1 - probs) * (1 - 2 * probs) * gap / 2).clamp(min=0)


def select_tokens(
    strategy: str,
    *,
    fraction: float,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    seed: int,
    forking_fraction: float = 0.2,
    collision: Tensor | None = None,
    gap: Tensor | None = None,
) -> Tensor:
    """Which of the step's N valid tokens pay the KL penalty.  [N], [N], [N] -> bool [N]

    The budget is K = round(fraction * N). Each strategy gives its tokens a priority and a candidate set;
    the K candidates of highest priority are taken, or all of them if there are fewer. Ties, and with them
    the strategies whose priority is constant, go at random by `seed`; the same arguments give the same mask.
    Forking tokens are the `forking_fraction` of highest entropy; `collision` is for `entropy_change` only, `gap`
    for `residual`.

    One departure from Eq. 13: `s >= quantile` selects *every* token when fewer than q of them have s > 0
    (the quantile is then 0). Here only s > 0 can be selected, and the count is K exactly.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
    if not 0 <= fraction <= 1 or not 0 < forking_fraction < 1:
        raise ValueError(f"fraction {fraction}, forking_fraction {forking_fraction}: give shares of the tokens, 0 to 1")
    if not logprobs.shape == entropy.shape == advantages.shape or logprobs.ndim != 1:
        raise ValueError(f"need flat vectors of one length, got logprobs {tuple(logprobs.shape)}, "
                         f"entropy {tuple(entropy.shape)}, advantages {tuple(advantages.shape)}")
    rank, share, needs_collision, needs_siblings = STRATEGIES[strategy]
    if needs_collision and collision is None:
        raise ValueError(f"{strategy} needs collision, sum_v pi(v)^2 (log pi(v) + H) at each token")
    if needs_siblings and gap is None:
        raise ValueError(f"{strategy} needs gap, alpha - beta at each token: see sibling_gap")
    logprobs, entropy, advantages = logprobs.detach(), entropy.detach(), advantages.detach()
    n = logprobs.numel()
    # One random order of the tokens; stable sorts keep it among equals. On CPU: one stream for all devices.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(logprobs.device)
    everyone = torch.ones_like(logprobs, dtype=torch.bool)
    forking = top_k(entropy, everyone, round(forking_fraction * n), order)
    priority, candidates = rank(StepTokens(logprobs, entropy, advantages, collision, gap, forking))
    return top_k(priority, candidates, round((fraction if share is None else share) * n), order)


def top_k(priority: Tensor, candidates: Tensor, k: int, order: Tensor) -> Tensor:
    """The k candidates of highest priority, equals in the given order.  [N], bool [N], [N] -> bool [N]"""
    order = order[candidates[order]]
    selected = torch.zeros_like(candidates)
    selected[order[priority[order].sort(descending=True, stable=True).indices[:k]]] = True
    return selected


def at_random(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Equal priorities: the random order decides."""
    return torch.zeros(candidates.shape, device=candidates.device), candidates


def largest_positive(score: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scores, among those above 0."""
    return score, score > 0


class StepTokens(NamedTuple):
    """The step's N valid tokens, flat: what a strategy may look at."""

    logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    collision: Tensor | None
    gap: Tensor | None
    forking: Tensor  # bool, the tokens of highest entropy


class Strategy(NamedTuple):
    """Everything about a selection strategy; the rest of the code knows none by name."""

    rank: Callable[[StepTokens], tuple[Tensor, Tensor]]  # -> priority [N], candidates bool [N]
    share: float | None = None  # of all tokens, where the budget is not selection.fraction
    needs_collision: bool = False  # the sampler has to record it: see entropy_change_score
    needs_siblings: bool = False  # alpha - beta within the group: see sibling_gap

    @property
    def selects(self) -> bool:
        return self.share != 0


# The paper's Table 1, between its two anchors, no token and every token.
STRATEGIES = {
    "none": Strategy(lambda t: at_random(torch.zeros_like(t.forking)), share=0.0),  # plain GRPO
    "uniform": Strategy(lambda t: at_random(torch.ones_like(t.forking))),
    "positive": Strategy(lambda t: at_random(t.advantages > 0)),
    "forking": Strategy(lambda t: at_random(t.forking)),
    "forking_positive": Strategy(lambda t: at_random(t.forking & (t.advantages > 0))),
    "non_forking": Strategy(lambda t: at_random(~t.forking)),
    "covariance": Strategy(lambda t: (covariance_score(t.logprobs, t.advantages), torch.ones_like(t.forking))),
    "scope": Strategy(lambda t: largest_positive(redistribution_score(t.logprobs.exp(), t.advantages))),
    "all": Strategy(lambda t: at_random(torch.ones_like(t.forking)), share=1.0),
    # Beyond the paper: the residual recovered, and the exact entropy change.
    "residual": Strategy(lambda t: largest_positive(recovered_score(t.logprobs.exp(), t.advantages, t.gap)),
                         needs_siblings=True),
    "entropy_change": Strategy(
        lambda t: largest_positive(entropy_change_score(t.logprobs, t.entropy, t.advantages, t.collision)),
        needs_collision=True),
}


def kl_divergence(logits: Tensor, reference_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary D = KL(policy || reference) at each position, nats.  [.., V], [.., V] -> [..]  Eq. 14

    Over the whole vocabulary, not the sampled token: the choice of a token depends on which token was
    sampled, and an estimate from that same sample (k3) is then biased. The gradient with respect to
    logit v is pi(v) (log pi(v)/pi_ref(v) - D) / temperature; the reference gets none. bf16 logits are taken to fp32.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.log_softmax(logits.to(wide) / temperature, dim=-1)
    log_ref = torch.log_softmax(reference_logits.detach().to(wide) / temperature, dim=-1)
    return (logp.exp() * (logp - log_ref)).sum(dim=-1)


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log pi_ref(y) - log pi(y), of sampled tokens: Schulman's one-sample estimate.  [n] -> [n]

    Its mean over y ~ pi is KL(pi || pi_ref), but the mean of its gradient is that of the *other* direction,
    KL(pi_ref || pi); and on tokens selected by what was sampled not even the mean is right.
    """
    # e^10 is weight enough: unbounded, one token that the policy has all but ruled out overflows the whole update.
    difference = (reference_logprobs.detach() - logprobs).clamp(max=10)
    return difference.exp() - difference - 1


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
