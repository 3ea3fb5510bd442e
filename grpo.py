"""GRPO (Shao et al. 2024): group advantages, token log-probabilities, the clipped policy loss, and its rivals.

Left out on purpose: the value network (the group mean is the baseline). KL penalties are in scope.py. All
per-token tensors are flat vectors [n] of *valid completion tokens*; nothing here sees padding, and no loss
here takes a mean: weights and counts are those of the whole update, so that a gradient does not depend on how
the update is cut up.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scope import covariance_score, select_tokens


def group_advantages(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Advantage of each completion within its group: (r - mean) / (std + eps), std with ddof 1.  [B] -> [B]

    Rows b with equal b // group_size are one group. A group of equal rewards gets exactly 0, not
    rounding noise divided by eps. SCOPE Eq. 18; eps as in TRL.

    >>> group_advantages(torch.tensor([1., 0., 0., 0., 0., 0., 0., 0.]), 8)[0].item()   # doctest: +ELLIPSIS
    2.474...
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group of one has no spread to normalise by")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not fall into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + eps)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int) -> Tensor:
    """`function` over chunks of `size` rows, results concatenated; each chunk is recomputed in backward.

    What lives only inside a chunk, such as logits [size, V], never exists for all rows at once,
    neither forward nor backward.
    """
    pieces = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of `tokens` under softmax(logits / temperature), in fp32 or better.  [.., V], [..] -> [..]"""
    logits = at_least_fp32(logits) / temperature
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats.  [.., V] -> [..]"""
    logprobs = torch.log_softmax(at_least_fp32(logits) / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def token_collision(logits: Tensor, *, temperature: float) -> Tensor:
    """sum_v pi(v)^2 (log pi(v) + H), for scope.entropy_change_score.  [.., V] -> [..]"""
    logprobs = torch.log_softmax(at_least_fp32(logits) / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1, keepdim=True)
    return ((2 * logprobs).exp() * (logprobs + entropy)).sum(dim=-1)


def at_least_fp32(logits: Tensor) -> Tensor:
    """bf16 logits carry 8 bits: a log-softmax taken in them is off in the second digit."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """PPO's clipped loss of each token, to be minimised: -min(rho A, clip(rho, 1-clip_low, 1+clip_high) A).  [n] -> [n]

    rho = exp(logprobs - old_logprobs). With one update per rollout old_logprobs is logprobs.detach(): rho is
    exactly 1, nothing clips, and the gradient is that of -A log p. clip_high > clip_low is DAPO's clip-higher.
    """
    advantages = advantages.detach()
    rho = ratio(logprobs, old_logprobs)
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)


def ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """rho = pi / pi_old of sampled tokens; the gradient flows through pi only.  [n] -> [n]"""
    return torch.exp(logprobs - old_logprobs.detach())


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Where the clip holds a token back (its policy_loss has no gradient).  [n] -> bool [n]"""
    rho = ratio(logprobs.detach(), old_logprobs)
    return ((advantages > 0) & (rho > 1 + clip_high)) | ((advantages < 0) & (rho < 1 - clip_low))


# ---------------------------------------------------------------- objectives: GRPO and its rivals

DIV_COEF = 0.01  # weight of the diversity term.  Yao et al. 2025
KL_COV_FRACTION = 2e-3  # share of tokens, of highest covariance, that pay.  Cui et al. 2025
KL_COV_COEF = 1.0  # weight of |log pi - log pi_old| on them.  Cui et al. 2025
CLIP_COV_FRACTION = 2e-4  # share of tokens left out of the update ...  Cui et al. 2025
CLIP_COV_LOW = 1.0  # ... at random among those of covariance above this ...
CLIP_COV_HIGH = 5.0  # ... and below this


class Tokens(NamedTuple):
    """n valid tokens of a micro-batch, flat; everything but `logprobs` is data.

    The normaliser is in the weights, so that an objective is a plain sum: 1 / N for the mean over the
    step's tokens ("token"), 1 / (T_i B) for the mean over completions of their means ("sequence").
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weight: Tensor  # by the chosen normaliser
    sequence_weight: Tensor  # 1 / (T_i B), for `div`
    marked: Tensor  # bool, the tokens that the objective singles out
    correct: Tensor  # bool, tokens of completions that earn the accuracy reward


def grpo_loss(t: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """Weighted sum of policy_loss.  Shao et al. 2024; `token` weights are DAPO's, `sequence` the original's"""
    loss = policy_loss(t.logprobs, t.old_logprobs, t.advantages, clip_low=clip_low, clip_high=clip_high)
    return (t.weight * loss).sum()


def forking_rl_loss(t: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """GRPO on the marked tokens only, those of highest entropy.  Wang et al. 2025, Eq. 6

    The weights then count marked tokens (their v2): the mean over what is kept, not over all.
    """
    return grpo_loss(t._replace(weight=t.weight * t.marked), clip_low=clip_low, clip_high=clip_high)


def div_loss(t: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """GRPO + DIV_COEF * mean over completions of 1[correct] (1/T_i) sum_t rho log pi.  Yao et al. 2025, Section 4

    Minimising rho log pi on correct completions raises their entropy; both rho and log pi carry gradient.
    """
    diversity = t.sequence_weight * t.correct * ratio(t.logprobs, t.old_logprobs) * t.logprobs
    return grpo_loss(t, clip_low=clip_low, clip_high=clip_high) + DIV_COEF * diversity.sum()


def kl_cov_loss(t: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """-rho A, unclipped, + KL_COV_COEF |log pi - log pi_old| on the marked, of highest covariance.  Cui et al. 2025

    The penalty is to the *rollout* policy: with one update per rollout its gradient is 0.
    """
    drift = (t.logprobs - t.old_logprobs.detach()).abs()
    gain = ratio(t.logprobs, t.old_logprobs) * t.advantages.detach()
    return (t.weight * (-gain + KL_COV_COEF * drift * t.marked)).sum()


def clip_cov_loss(t: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """GRPO without the marked tokens, a few of high covariance, and with a wider clip.  Cui et al. 2025"""
    return grpo_loss(t._replace(weight=t.weight * ~t.marked), clip_low=clip_low, clip_high=clip_high)


def clip_cov_tokens(
    covariance: Tensor, clipped: Tensor, *, fraction: float, low: float, high: float, seed: int
) -> Tensor:
    """round(fraction * N) random tokens, at least 1, with low < C < high and not clipped already.  [N] -> bool [N]"""
    order = torch.randperm(len(covariance), generator=torch.Generator().manual_seed(seed)).to(covariance.device)
    candidates = (covariance > low) & (covariance < high) & ~clipped
    marked = torch.zeros_like(candidates)
    marked[order[candidates[order]][: max(1, round(fraction * len(covariance)))]] = True
    return marked


# What an objective marks, of the flat tokens of the whole update, as SCOPE selects: (tokens, config, seed) -> bool [N].
# tokens has, by name, [N] each: logprobs, entropy, advantages of the current policy, and old_logprobs.


def forking_rl_marks(tokens: dict[str, Tensor], config, seed: int) -> Tensor:
    return select_tokens("forking", fraction=config.forking_fraction, forking_fraction=config.forking_fraction,
                         seed=seed, **now(tokens))


def kl_cov_marks(tokens: dict[str, Tensor], config, seed: int) -> Tensor:
    at_least_one = max(KL_COV_FRACTION, 1 / len(tokens["logprobs"]))
    return select_tokens("covariance", fraction=at_least_one, seed=seed, **now(tokens))


def clip_cov_marks(tokens: dict[str, Tensor], config, seed: int) -> Tensor:
    logprobs, advantages = tokens["logprobs"], tokens["advantages"]
    low, high = OBJECTIVES["clip_cov"].clip
    already = clipped(logprobs, tokens["old_logprobs"], advantages, clip_low=low, clip_high=high)
    seed ^= 0x9E3779B9  # another draw than the selection's; torch seeds with 32 bits
    return clip_cov_tokens(covariance_score(logprobs, advantages), already, fraction=CLIP_COV_FRACTION,
                           low=CLIP_COV_LOW, high=CLIP_COV_HIGH, seed=seed)


def now(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tokens[name] for name in ("logprobs", "entropy", "advantages")}


def no_tokens(tokens: dict[str, Tensor], config, seed: int) -> Tensor:
    return torch.zeros_like(tokens["logprobs"], dtype=torch.bool)


def no_rows(marked: Tensor, correct: Tensor) -> Tensor:
    return torch.zeros_like(correct)


class Objective(NamedTuple):
    """Everything about an objective; the rest of the code knows none by name."""

    loss: Callable[..., Tensor]  # (Tokens, *, clip_low, clip_high) -> scalar, to be minimised
    marks: Callable[..., Tensor] = no_tokens  # the tokens it singles out
    clip: tuple[float, float] | None = None  # its own (low, high), where they are not grpo.clip_low and grpo.clip_high
    mean_over_marked: bool = False  # its mean counts the marked tokens only
    other_rows: Callable[..., Tensor] = no_rows  # (marked [B, C], correct [B]) -> bool [B]: rows that it moves at A = 0
    verifiable: bool = False  # it asks which completions are correct
    off_policy: bool = False  # what it adds is 0 while the policy is the one that sampled


OBJECTIVES = {
    "grpo": Objective(grpo_loss),
    "forking_rl": Objective(forking_rl_loss, marks=forking_rl_marks, mean_over_marked=True),
    "div": Objective(div_loss, other_rows=lambda marked, correct: correct, verifiable=True),
    "kl_cov": Objective(kl_cov_loss, marks=kl_cov_marks, clip=(1.0, math.inf),  # no clip at all
                        other_rows=lambda marked, correct: marked.any(dim=1), off_policy=True),
    "clip_cov": Objective(clip_cov_loss, marks=clip_cov_marks, clip=(1.0, 1.0)),  # widened to 1
}
