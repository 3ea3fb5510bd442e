"""Objectives are the policy losses: GRPO, and those of Table 2 that counter entropy collapse.

Each objective returns the loss of every token of a micro-batch, already multiplied by the token's
weight in the mean, so that the loss of a step is a plain sum. Some objectives treat a few tokens
specially. They mark these among the tokens of the whole step, as SCOPE selects its tokens. The
constants are those of the papers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo import clipped, policy_loss, ratio
from scope import covariance_score, select_tokens

DIV_COEF = 0.01  # Yao et al. 2025
KL_COV_FRACTION = 2e-3  # Cui et al. 2025, for 7B models
KL_COV_COEF = 1.0
CLIP_COV_FRACTION = 2e-4
CLIP_COV_RANGE = (1.0, 5.0)  # only tokens with a covariance in between are left out
CLIP_COV_CLIP = (1.0, 1.0)  # (low, high); wider than GRPO's


class MicroBatch(NamedTuple):
    """Holds some completions: padded tokens for the model, and flat vectors of n valid tokens.

    `weight` holds the normaliser: 1/N for the mean over the step's tokens, or 1/(T_i B) for the
    mean over completions of their means (T_i tokens in completion i, B completions in the step,
    over all ranks).
    """

    rows: list[int]  # which completions of this rank
    tokens: Tensor  # [b, T] prompts and completions, padded on the right
    # [b, T] bool, True n times: where the hidden state predicts a completion token
    predicts_completion: Tensor
    targets: Tensor  # [n] the completion tokens
    old_logprobs: Tensor  # [n] under the policy before the step's first update
    advantages: Tensor  # [n]
    correct: Tensor  # [n] bool: the completion is correct
    selected: Tensor  # [n] bool: the token pays the KL penalty
    token_mask: Tensor  # [n] bool: the tokens that the objective treats specially
    weight: Tensor  # [n]
    sequence_weight: Tensor  # [n] 1/(T_i B), whatever the normaliser


# A loss takes (logprobs [n], old_logprobs [n], batch, clip_low, clip_high) and returns [n]; the sum
# is minimised.


def grpo(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, clip_low: float, clip_high: float
) -> Tensor:
    """Return the clipped policy loss times the weight of each token.  Shao et al. 2024

    grpo.normaliser=token is the mean of DAPO, sequence that of the original.
    """
    loss = policy_loss(
        logprobs, old_logprobs, batch.advantages, clip_low=clip_low, clip_high=clip_high
    )
    return batch.weight * loss


def forking_rl(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, clip_low: float, clip_high: float
) -> Tensor:
    """Return GRPO's loss on the forking tokens, and 0 on all others.  Wang et al. 2025, Eq. 6

    The mean is over the forking tokens (version 2 of their paper), not over all tokens.
    """
    return grpo(logprobs, old_logprobs, batch, clip_low, clip_high) * batch.token_mask


def div(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, clip_low: float, clip_high: float
) -> Tensor:
    """Add a bonus for the entropy of correct completions.  Yao et al. 2025, Section 4

    The added loss is DIV_COEF * mean over completions of 1[correct] (1/T_i) sum_t rho log pi.
    Minimising rho log pi on correct completions raises their entropy; both rho and log pi carry
    gradient.
    """
    diversity = batch.sequence_weight * batch.correct * ratio(logprobs, old_logprobs) * logprobs
    return grpo(logprobs, old_logprobs, batch, clip_low, clip_high) + DIV_COEF * diversity


def kl_cov(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, clip_low: float, clip_high: float
) -> Tensor:
    """Penalise |log pi - log pi_old| on the tokens of highest covariance.  Cui et al. 2025

    The policy loss is -rho A, unclipped. The penalty keeps the policy close to the one that
    sampled, so its gradient is 0 with one update per rollout.
    """
    drift = (logprobs - old_logprobs.detach()).abs()
    gain = ratio(logprobs, old_logprobs) * batch.advantages.detach()
    return batch.weight * (KL_COV_COEF * drift * batch.token_mask - gain)


def clip_cov(
    logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch, clip_low: float, clip_high: float
) -> Tensor:
    """Leave the marked tokens, a few of high covariance, out of GRPO's loss.  Cui et al. 2025"""
    return grpo(logprobs, old_logprobs, batch, clip_low, clip_high) * ~batch.token_mask


# A token mask takes (tokens, old_logprobs, config, seed) and returns bool [N]: which of the step's
# tokens the objective treats specially. `tokens` has, by name, the vectors [N] that select_tokens
# takes; old_logprobs [N] are those from before the first update.


def mark_none(tokens: dict[str, Tensor], old_logprobs: Tensor, config, seed: int) -> Tensor:
    return torch.zeros_like(old_logprobs, dtype=torch.bool)


def mark_forking(tokens: dict[str, Tensor], old_logprobs: Tensor, config, seed: int) -> Tensor:
    """Mark every forking token."""
    return select_tokens(
        "forking",
        fraction=config.forking_fraction,
        forking_fraction=config.forking_fraction,
        seed=seed,
        **tokens,
    )


def mark_covariance(tokens: dict[str, Tensor], old_logprobs: Tensor, config, seed: int) -> Tensor:
    """Mark the share KL_COV_FRACTION of tokens with the highest covariance, at least one."""
    fraction = max(KL_COV_FRACTION, 1 / len(old_logprobs))
    return select_tokens("covariance", fraction=fraction, seed=seed, **tokens)


def mark_clip_cov(tokens: dict[str, Tensor], old_logprobs: Tensor, config, seed: int) -> Tensor:
    """Mark random tokens whose covariance is in CLIP_COV_RANGE and that are not clipped.

    They are the share CLIP_COV_FRACTION of all tokens, at least one.
    """
    clip_low, clip_high = CLIP_COV_CLIP
    already_clipped = clipped(
        tokens["logprobs"],
        old_logprobs,
        tokens["advantages"],
        clip_low=clip_low,
        clip_high=clip_high,
    )
    covariance = covariance_score(tokens["logprobs"], tokens["advantages"])
    low, high = CLIP_COV_RANGE
    candidates = (covariance > low) & (covariance < high) & ~already_clipped
    # these random numbers must differ from those of select_tokens, which has the same seed
    generator = torch.Generator().manual_seed(seed ^ 0x9E3779B9)
    order = torch.randperm(len(covariance), generator=generator).to(covariance.device)
    count = max(1, round(CLIP_COV_FRACTION * len(covariance)))
    marked = torch.zeros_like(candidates)
    marked[order[candidates[order]][:count]] = True
    return marked


class Objective(NamedTuple):
    """Describes one objective."""

    loss: Callable[..., Tensor]
    token_mask: Callable[..., Tensor] = mark_none
    clip: tuple[float, float] | None = None  # (low, high) instead of grpo.clip_low, clip_high
    mean_over_mask: bool = False  # the mean counts the marked tokens only
    # correct completions have a gradient even at advantage 0; needs a reward that uses the grader
    learns_from_correct: bool = False
    learns_from_mask: bool = False  # marked tokens have a gradient even at advantage 0
    # what it adds to GRPO has no gradient while the policy is still the one that sampled
    needs_several_updates: bool = False


OBJECTIVES = {
    "grpo": Objective(grpo),
    "forking_rl": Objective(forking_rl, mark_forking, mean_over_mask=True),
    "div": Objective(div, learns_from_correct=True),
    "kl_cov": Objective(
        kl_cov,
        mark_covariance,
        clip=(1.0, math.inf),
        learns_from_mask=True,
        needs_several_updates=True,
    ),
    "clip_cov": Objective(clip_cov, mark_clip_cov, clip=CLIP_COV_CLIP),
}
