"""GRPO: group advantages, token log-probabilities, and the clipped policy loss (Shao et al. 2024).

Left out on purpose: the value network (the group mean is the baseline) and the reference KL inside the
loss (SCOPE's goes on selected tokens only, see scope.py). All per-token tensors are flat vectors [n] of
*valid completion tokens*; nothing here sees padding, and nothing here takes a mean: the caller divides by
the token count of the whole step, so that a gradient does not depend on how the step is cut up.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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


def at_least_fp32(logits: Tensor) -> Tensor:
    """bf16 logits carry 8 bits: a log-softmax taken in them is off in the second digit."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """PPO's clipped loss of each token, to be minimised: -min(rho A, clip(rho, 1-clip_low, 1+clip_high) A).  [n] -> [n]

    rho = exp(logprobs - old_logprobs). With one update per rollout old_logprobs is logprobs.detach(): rho is
    exactly 1, nothing clips, and the gradient is that of -A log p.
    """
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Where the clip holds a token back (its policy_loss has no gradient).  [n] -> bool [n]"""
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
