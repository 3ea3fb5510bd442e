"""A rank's part of an update, cut into micro-batches: what each of them needs, the reference's states included.

Shapes: B completions of this rank, C their padded length; n valid completion tokens of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import grpo
from rollout import Rollout
from support import distributed, models
from support.models import hidden_states


@dataclass
class MicroBatch:
    """Some rows of this rank's rollout, packed (Rollout.pack); n valid completion tokens, flat."""

    tokens: Tensor  # [b, T]
    predicts: Tensor  # [b, T] bool, n of them
    targets: Tensor  # [n]
    old_logprobs: Tensor  # [n], before the step's first update
    advantages: Tensor  # [n]
    weight: Tensor  # [n], the objective's normaliser
    sequence_weight: Tensor  # [n]
    marked: Tensor  # [n] bool
    correct: Tensor  # [n] bool
    selected: Tensor  # [n] bool
    compared: Tensor  # [n] bool: tokens at which the reference is needed, m of them
    reference_hidden: Tensor | None  # [m, hidden size]
    reference_head: torch.nn.Module | None


@dataclass
class MicroBatches:
    """This rank's rows in micro-batches of similar length, the longest first, and whether each is the last one.

    There is at least one: every rank takes part in the backward that adds up the gradients of all.

    Rows without any gradient are left out. The reference model runs before the first micro-batch, on rows where it is
    needed.
    """

    sampled: Rollout
    advantages: Tensor  # [B]
    correct: Tensor  # [B] bool
    selection: object  # step.Selection
    reference: torch.nn.Module | None
    config: SimpleNamespace
    world: distributed.World

    def __iter__(self) -> Iterator[tuple[MicroBatch, bool]]:
        sampled, selection, config = self.sampled, self.selection, self.config
        advantages, correct, reference = self.advantages, self.correct, self.reference
        completions = float(distributed.total(torch.tensor(len(advantages), device=advantages.device)))  # of all ranks
        mask, lengths, objective = sampled.mask, sampled.lengths, grpo.OBJECTIVES[config.objective]
        counted, num_counted = mask, len(selection.flat["marked"])
        if objective.mean_over_marked:
            counted, num_counted = selection.marked, int(selection.flat["marked"].sum())
        sequence_weight = 1 / (lengths * completions)
        if config.grpo.normaliser == "sequence":
            weight = 1 / (counted.sum(dim=1).clamp(min=1) * completions)
        else:
            weight = torch.full_like(sequence_weight, 1 / max(num_counted, 1))

        compared = mask if config.grpo.kl_coef > 0 else selection.selected
        has_gradient = (advantages != 0) | compared.any(dim=1) | objective.other_rows(selection.marked, correct)
        if config.grpo.entropy_coef > 0:
            has_gradient[:] = True
        place, reference_states = torch.zeros_like(mask, dtype=torch.long), None
        if compared.any():
            place[compared] = torch.arange(int(compared.sum()), device=mask.device)
            reference_states = states_of(reference, sampled, compared, place, config, self.world)
        rows = has_gradient.nonzero().squeeze(1).tolist() or [0]
        parts = list(sampled.cut(rows, config))[::-1]
        for part in parts:
            tokens, predicts = sampled.pack(part)
            valid, reference_hidden = mask[part], None
            if compared[part].any():
                reference_hidden = reference_states[place[part][compared[part]]]

            def flat(values: Tensor, part=part, valid=valid) -> Tensor:
                values = values[part]
                return (values[:, None].expand_as(valid) if values.ndim == 1 else values)[valid]

            yield MicroBatch(
                tokens, predicts, flat(sampled.tokens), flat(sampled.logprobs), flat(advantages), flat(weight),
                flat(sequence_weight), flat(selection.marked), flat(correct), flat(selection.selected), flat(compared),
                reference_hidden, reference.get_output_embeddings() if reference is not None else None,
            ), part is parts[-1]


@torch.no_grad()
def states_of(reference, sampled: Rollout, compared: Tensor, place: Tensor, config, world) -> Tensor:
    """Hidden states of the reference [m, hidden size] that predict the m compared tokens; place [B, C] says which."""
    states = None
    with models.visiting(reference, world.device), world.autocast():
        for part in sampled.cut(compared.any(dim=1).nonzero().squeeze(1).tolist(), config):
            tokens, predicts = sampled.pack(part)
            hidden = hidden_states(reference, tokens)[predicts][compared[part][sampled.mask[part]]]
            states = hidden.new_zeros(int(compared.sum()), hidden.shape[1]) if states is None else states
            states[place[part][compared[part]]] = hidden
    return states
