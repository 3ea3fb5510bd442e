"""GRPO (Shao et al. 2024): group advantages, token log-probabilities and the clipped policy loss.

As in the original, there is no value network, because the group mean is the baseline. Unlike the
original, there is no KL penalty, because which tokens pay one is the subject of scope.py. All
per-token tensors are flat vectors [n] of *valid completion tokens*, so nothing here sees padding.
Nothing here takes a mean over tokens: train.py divides by counts over the whole step, so that the
gradient does not depend on how the step is cut into micro-batches.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Normalise rewards within each group: (r - mean) / (std + eps).  [B] -> [B]  SCOPE Eq. 18

    The standard deviation divides by group_size - 1. Each group_size consecutive completions are
    one group. In a group of equal rewards every advantage is exactly 0, and not rounding noise
    divided by eps. The default of eps is that of TRL.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    tensor([ 1.4997, -0.4999, -0.4999, -0.4999])
    """
    groups = rewards.view(-1, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (
        groups.std(dim=1, keepdim=True) + eps
    )
    all_equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0).view(-1)


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int) -> Tensor:
    """Apply `function` to chunks of `size` rows, and recompute each chunk in backward.

    An intermediate result of `function`, such as logits [size, V], is then never in memory for all
    rows at once, neither in forward nor in backward.
    """
    chunks = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) at the given tokens.  [.., V], [..] -> [..]

    bf16 logits are converted to fp32, because a log-softmax in bf16 is wrong in the second digit.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return rho = pi / pi_old; the gradient flows through pi only.  [n] -> [n]"""
    return torch.exp(logprobs - old_logprobs.detach())


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Return PPO's clipped loss of each token.  [n] -> [n]

    It is -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), with rho = pi / pi_old. With one
    update per rollout old_logprobs is logprobs.detach(). Then rho is exactly 1, nothing is clipped,
    and the gradient is that of -A log p. clip_high > clip_low is DAPO's clip-higher.
    """
    advantages = advantages.detach()
    rho = ratio(logprobs, old_logprobs)
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Return which tokens are clipped and so get no gradient from policy_loss.  [n] -> bool [n]"""
    rho = ratio(logprobs.detach(), old_logprobs)
    return ((advantages > 0) & (rho > 1 + clip_high)) | ((advantages < 0) & (rho < 1 - clip_low))
