"""A rank's part of an update, cut into micro-batches: what each of them needs, the reference's states included.

Shapes: B completions of this rank, C their padded length; n valid completion tokens of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import grpo
from rollout import Rollout
from support import distributed, models
from support.checks import Halted
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
    selected: Tensor  # [n] bool, m of them: there the reference is needed
    reference_hidden: Tensor | None  # [m, hidden size]
    reference_head: torch.nn.Module | None


@dataclass
class MicroBatches:
    """This rank's rows in micro-batches of similar length, the longest first, cut anew each time that they are gone
    through; and whether each is the one of DDP's synchronised backward.

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

    def __post_init__(self):
        """B over all ranks; from here on no rank waits for others."""
        self.completions = float(distributed.total(torch.tensor(len(self.advantages), device=self.advantages.device)))

    def __iter__(self) -> Iterator[tuple[MicroBatch, bool]]:
        sampled, selection, config = self.sampled, self.selection, self.config
        advantages, correct, reference = self.advantages, self.correct, self.reference
        mask, lengths, objective = sampled.mask, sampled.lengths, grpo.OBJECTIVES[config.objective]
        counted, num_counted = mask, len(selection.flat["marked"])
        if objective.mean_over_marked:
            counted, num_counted = selection.marked, int(selection.flat["marked"].sum())
        sequence_weight = 1 / (lengths * self.completions)
        if config.grpo.normaliser == "sequence":
            weight = 1 / (counted.sum(dim=1).clamp(min=1) * self.completions)
        else:
            weight = torch.full_like(sequence_weight, 1 / max(num_counted, 1))

        selected = selection.selected
        has_gradient = (advantages != 0) | selected.any(dim=1) | objective.other_rows(selection.marked, correct)
        place, reference_states = torch.zeros_like(mask, dtype=torch.long), None
        if selected.any():
            place[selected] = torch.arange(int(selected.sum()), device=mask.device)
            reference_states = states_of(reference, sampled, selected, place, config, self.world)
        rows, alone = has_gradient.nonzero().squeeze(1).tolist() or [0], []
        if torch.distributed.is_initialized():
            # Ranks wait for each other in the synchronised backward, which therefore cannot be done again where memory
            # runs out: it has one row, the shortest, and all else comes before. Every rank has one, needed or not.
            alone = [min(rows, key=lambda row: (len(sampled.prompts[row]) + int(lengths[row]), row))]
        parts = list(sampled.cut([row for row in rows if row not in alone], config))[::-1]
        for part in parts + [alone] * bool(alone):
            tokens, predicts = sampled.pack(part)
            valid, reference_hidden = mask[part], None
            if selected[part].any():
                reference_hidden = reference_states[place[part][selected[part]]]

            def flat(values: Tensor, part=part, valid=valid) -> Tensor:
                values = values[part]
                return (values[:, None].expand_as(valid) if values.ndim == 1 else values)[valid]

            yield MicroBatch(
                tokens, predicts, flat(sampled.tokens), flat(sampled.logprobs), flat(advantages), flat(weight),
                flat(sequence_weight), flat(selection.marked), flat(correct), flat(selected), reference_hidden,
                reference.get_output_embeddings() if reference is not None else None,
            ), part is alone

    def halve(self) -> None:
        """Half as much at once, for the rest of the run."""
        parts = list(self.sampled.cut(range(len(self.sampled.mask)), self.config))
        if max(map(len, parts)) == 1:
            raise Halted("out of memory in the update with one completion at a time: give gradient_checkpointing=true, "
                         "offload=true, a smaller logits_chunk or max_new_tokens, or more ranks")
        several = [part for part in parts if len(part) > 1]  # one completion alone may be over the limit
        self.config.micro_batch_tokens = max(self.sampled.pack(part)[0].numel() for part in several) // 2
        tqdm.write(f"out of memory in the update: micro_batch_tokens={self.config.micro_batch_tokens} from here on "
                   f"(rank {self.world.rank})")


@torch.no_grad()
def states_of(reference, sampled: Rollout, selected: Tensor, place: Tensor, config, world) -> Tensor:
    """Hidden states of the reference [m, hidden size] that predict the m selected tokens; place [B, C] says which."""
    states = None
    with models.visiting(reference, world.device), world.autocast():
        for part in sampled.cut(selected.any(dim=1).nonzero().squeeze(1).tolist(), config):
            tokens, predicts = sampled.pack(part)
            hidden = hidden_states(reference, tokens)[predicts][selected[part][sampled.mask[part]]]
            states = hidden.new_zeros(int(selected.sum()), hidden.shape[1]) if states is None else states
            states[place[part][selected[part]]] = hidden
    return states
