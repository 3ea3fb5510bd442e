"""One training step in parts, in the numbers of README and train.py, and `set_up`, which makes what a run works with.

`draw_problems` is 1, `sample` is 2, `reward` is 3 (4 is grpo.group_advantages), `select` is 5, `update` is 6.
Shapes: B completions of this rank, C their padded length; N valid tokens of an update, all ranks; n of a micro-batch.
"""

import copy
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import grpo
import rollout
import scope
import toy
from micro_batches import MicroBatch, MicroBatches
from rewards import GRADERS, REWARDS
from rollout import Rollout
from support import distributed, memory, models, watch
from support.checks import record_of, require
from support.config import UserError
from support.models import hidden_states
from support.optimizer import MasterAdamW

# ---------------------------------------------------------------- what a run works with


@dataclass
class Run:
    config: SimpleNamespace
    world: distributed.World
    policy: torch.nn.Module
    tokenizer: object
    stop: list[int]  # ids that end a completion
    problems: list[dict]  # to train on
    reference: torch.nn.Module | None = None  # pi_ref, the initial model, frozen; None: not needed
    loss: torch.nn.Module | None = None  # MicroBatchLoss, under DDP with torchrun
    optimizer: torch.optim.Optimizer | None = None
    inputs: dict[str, str] | None = None  # fingerprints of what it began with, for checkpoint.py


def set_up(config, problems: list[dict], world, *, weights: bool = True, training: bool = True) -> Run:
    """The parts of a run. Without `training` only what sampling takes; without `weights` the policy is on meta."""
    if weights:
        policy, tokenizer = models.load(toy.model_folder(config.model, config), world.dtype)
    else:
        policy, tokenizer = toy.blank_model(config)
    problems = data.drop_long_prompts(problems, tokenizer, policy.config.max_position_embeddings, config)
    run = Run(config, world, policy, tokenizer, models.stop_ids(policy, tokenizer), problems)
    if weights:
        policy.to(world.device)
    if not (weights and training):
        return run
    models.set_stop(policy, run.stop)  # whoever loads the trained model stops where it was stopped
    policy.train()  # dropout is off; train mode is what gradient checkpointing asks for
    if config.gradient_checkpointing:
        models.recompute_layers(policy)
    if scope.STRATEGIES[config.selection.strategy].selects:
        run.reference = copy.deepcopy(policy).eval().requires_grad_(False)
        if config.offload:
            models.park(run.reference)
    run.loss = MicroBatchLoss(policy, config, world.size)
    for parameter in policy.parameters():  # once: DDP makes them views of its buckets, and they stay that
        parameter.grad = torch.zeros_like(parameter)
    if torch.distributed.is_initialized():
        run.loss = in_ranks(run.loss, world.device)
    run.optimizer = MasterAdamW(policy.named_parameters(), lr=config.optimizer.lr, offload=config.offload,
                                weight_decay=config.optimizer.weight_decay)
    return run


def in_ranks(loss_module, device) -> DistributedDataParallel:
    """Nothing is sent but the gradients of the synchronised backward. Buffers are constants: to send them in a forward
    would make the others wait for a rank that does its micro-batches again."""
    known = inspect.signature(DistributedDataParallel).parameters  # torch before 2.13 has the older name
    constant = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(loss_module, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, **{constant: False})


def check_methods(config) -> None:
    """Refuses names of methods that are not there, and methods that do not go together."""
    reward = record_of("reward", config.reward.kind, REWARDS)
    objective = record_of("objective", config.objective, grpo.OBJECTIVES)
    strategy = record_of("selection.strategy", config.selection.strategy, scope.STRATEGIES)
    record_of("reward.grader", config.reward.grader, GRADERS)
    require(reward.verifiable or not objective.verifiable,
            f"objective={config.objective} with reward={config.reward.kind}: it asks which completions are correct; "
            "give reward=accuracy")
    require(getattr(config.selection, "kl_coef", 1) > 0 or not strategy.selects,
            f"selection.kl_coef=0 with selection.strategy={config.selection.strategy}: nothing would be paid; give "
            "strategy=none")


# ---------------------------------------------------------------- 1-3


def step_problems(problems: list, step: int, *, count: int, seed: int) -> list:
    """The problems of a step: a new order each epoch, a pure function of (seed, epoch); the remainder is dropped."""
    epoch, place = divmod(step, len(problems) // count)
    order = np.random.default_rng([seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * count : (place + 1) * count]]


def draw_problems(run: Run, step: int) -> tuple[list[dict], list[int]]:
    """Step 1: the problem of each of this rank's B completions, and their numbers within the step, over all ranks."""
    config = run.config
    drawn = step_problems(run.problems, step, count=config.prompts_per_step, seed=config.seed)
    part = config.prompts_per_step // config.grpo.updates_per_rollout  # of each update's part, this rank's share
    mine = [first + i for first in range(0, config.prompts_per_step, part) for i in run.world.share(part)]
    rows = [i * config.group_size + j for i in mine for j in range(config.group_size)]
    return [drawn[row // config.group_size] for row in rows], rows


def sample(run: Run, problems: list[dict], rows: list[int], step: int) -> Rollout:
    """Step 2: a completion for each problem; its row number decides its draws, whatever the number of ranks."""
    config = run.config
    with run.world.autocast():
        return rollout.draw(
            config, run.policy, data.prompt_ids(run.tokenizer, problems, config.prompt), rows, stop=run.stop,
            seed=config.seed, step=step, collision=scope.STRATEGIES[config.selection.strategy].needs_collision)


def reward(run: Run, problems: list[dict], sampled: Rollout) -> tuple[Tensor, Tensor, list[str]]:
    """Step 3: rewards [B], correct [B] bool, and the texts; with RLIF the grader's verdict is only logged."""
    correct, texts = grade(run.tokenizer, problems, sampled, run.config.reward.grader)
    return REWARDS[run.config.reward.kind].function(correct, sampled), correct, texts


def grade(tokenizer, problems: list[dict], sampled: Rollout, grader: str) -> tuple[Tensor, list[str]]:
    """Whether each completion is correct [B] bool, which a truncated one is not, and the texts."""
    texts = rollout.decode(tokenizer, sampled)
    verdicts = [verdict(problem, text, grader) for problem, text in zip(problems, texts)]
    return torch.tensor(verdicts, dtype=torch.bool, device=sampled.mask.device) & sampled.stopped, texts


_told: set[str] = set()  # of what graders stumbled over


def verdict(problem: dict, text: str, grader: str) -> bool:
    """The grader's; False where it stumbles over a completion, and a warning, one for each kind of error."""
    try:
        return data.is_correct(problem, text, grader)
    except UserError:
        raise
    except Exception as error:  # one completion of millions is to end no run
        kind = type(error).__name__
        if kind not in _told:
            _told.add(kind)
            tqdm.write(f"warning: the grader raised {kind}: {error}, at {str(problem)[:200]} with the completion "
                       f"{text[-200:]!r}; it counts as wrong, and so will others without a warning")
        return False


# ---------------------------------------------------------------- 5


@dataclass
class Selection:
    """What step 5 decided, for this rank's rows [B, C] and, flat, for all ranks [N]."""

    selected: Tensor  # [B, C] bool: tokens that pay the KL penalty
    marked: Tensor  # [B, C] bool: tokens that the objective singles out
    flat: dict[str, Tensor]  # by name [N]: logprobs, entropy, collision, advantages, old_logprobs, selected, marked


def select(current: Rollout, old_logprobs: Tensor, advantages: Tensor, config, seed: int) -> Selection:
    """Step 5: decided on the flat valid tokens of all ranks, so that cutting up a step changes no choice.

    `current` holds the record of the current policy; old_logprobs [B, C] are those before the step's first update.
    """
    mask = current.mask
    columns = {"logprobs": current.logprobs, "entropy": current.entropy, "collision": current.collision,
               "advantages": advantages[:, None].expand_as(mask), "old_logprobs": old_logprobs}
    if scope.STRATEGIES[config.selection.strategy].needs_siblings:  # groups are whole on a rank
        columns["gap"], columns["branching"] = scope.sibling_gap(current.tokens, mask, advantages, config.group_size)
    own = torch.stack([column[mask].float() for column in columns.values()], dim=1)
    counts = distributed.gather(torch.tensor([len(own)], device=own.device)).tolist()
    flat = dict(zip(columns, distributed.gather(own).unbind(dim=1)))
    flat["selected"] = scope.select_tokens(
        config.selection.strategy, fraction=config.selection.fraction, forking_fraction=config.forking_fraction,
        seed=seed, **{name: flat.get(name) for name in ("logprobs", "entropy", "advantages", "collision", "gap")})
    flat["marked"] = grpo.OBJECTIVES[config.objective].marks(flat, config, seed)

    def of_this_rank(chosen: Tensor) -> Tensor:
        part = torch.zeros_like(mask)
        part[mask] = chosen.split(counts)[distributed.rank()]
        return part

    return Selection(of_this_rank(flat["selected"]), of_this_rank(flat["marked"]), flat)


# ---------------------------------------------------------------- 6


class MicroBatchLoss(torch.nn.Module):
    """The loss of one micro-batch, as a module so that DDP sees every use of a weight in its forward.

    Every term is a sum over the micro-batch divided by a count over the whole update on all ranks, times
    the world size, for DDP averages gradients: however an update is cut up, its gradient is the same.
    """

    def __init__(self, policy, config, world_size: int):
        super().__init__()
        self.policy, self.config, self.world_size = policy, config, world_size
        self.objective = grpo.OBJECTIVES[config.objective]
        low, high = self.objective.clip or (config.grpo.clip_low, config.grpo.clip_high)
        self.clip = {"clip_low": low, "clip_high": high}

    def forward(self, batch: MicroBatch, num_tokens: int, num_selected: int, on_policy: bool):
        """The loss, to be minimised, and the sums over tokens that `update` makes metrics of."""
        config, head, temperature = self.config, self.policy.get_output_embeddings(), self.config.temperature
        hidden = hidden_states(self.policy, batch.tokens)[batch.predicts]  # [n, hidden size]

        def chunks(function, *tensors):
            return grpo.in_chunks(function, *tensors, size=config.logits_chunk)

        logprobs = chunks(lambda h, y: grpo.token_logprobs(head(h), y, temperature=temperature), hidden, batch.targets)
        # Before the first update the policy is still the one that sampled: the ratio is 1, free of rounding.
        old_logprobs = logprobs.detach() if on_policy else batch.old_logprobs
        tokens = grpo.Tokens(logprobs, old_logprobs, batch.advantages, batch.weight, batch.sequence_weight,
                             batch.marked, batch.correct)
        loss = self.objective.loss(tokens, **self.clip)

        penalty = torch.zeros((), device=loss.device)
        if batch.selected.any():  # SCOPE's term, Eq. 15
            divergence = chunks(
                lambda h, r: scope.kl_divergence(head(h), batch.reference_head(r), temperature=temperature),
                hidden[batch.selected], batch.reference_hidden)
            penalty = divergence.sum() / num_selected
            share = num_selected / num_tokens if config.selection.normaliser == "tokens" else 1.0
            loss = loss + config.selection.kl_coef * share * penalty

        clipped = grpo.clipped(logprobs, old_logprobs, batch.advantages, **self.clip).sum() / num_tokens
        change = logprobs.detach() - batch.old_logprobs
        sums = [loss.detach(), penalty.detach(), clipped, change.abs().sum(), (change.exp() - change - 1).sum(),
                torch.tensor(float(len(change)), device=loss.device)]
        return loss * self.world_size, torch.stack(sums)


def update(
    loss_module, optimizer, batches: MicroBatches, selection: Selection, *, on_policy: bool, world, max_grad_norm: float
) -> dict[str, float]:
    """Step 6: one optimizer update from the gradient of all micro-batches of all ranks."""
    num_tokens, num_selected = len(selection.flat["selected"]), int(selection.flat["selected"].sum())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(batch) -> Tensor:
        """Adds to the gradient; returns the sums over tokens."""
        with world.autocast():
            loss, sums = loss_module(batch, num_tokens, num_selected, on_policy)
        loss.backward()
        return sums

    def accumulate() -> tuple[Tensor, object]:
        """All but the synchronised micro-batch, which is returned. No rank waits for another here (but once, in the
        second update's first forward, where DDP orders its buckets): so this one may do it again."""
        optimizer.zero_grad(set_to_none=False)  # None would make a second set of gradients beside DDP's buckets
        totals = torch.zeros(6, device=world.device)
        for batch, synchronised in batches:
            if synchronised:
                return totals, batch
            totals += backward(batch)
        return totals, None

    with loss_module.no_sync() if hasattr(loss_module, "no_sync") else nullcontext():
        totals, last = memory.retried(accumulate, lambda: batches.halve())
    if last is not None:
        watch.collective()
        totals += backward(last)
    totals = distributed.total(totals)
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    norm = torch.stack(norms).norm()  # of bf16 gradients too in fp32
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    grad_norm = float(norm)
    loss, penalty, clip_frac, drift, kl_old, scored = totals.tolist()
    finite = math.isfinite(grad_norm) and math.isfinite(loss)  # the same on every rank
    if finite:
        optimizer.step()
    elif world.is_main:
        tqdm.write(f"warning: the loss ({loss}) or its gradient ({grad_norm}) is not finite; this update is skipped")
    metrics = {"loss": loss, "grad_norm": grad_norm, "clip_frac": clip_frac, "kl/selected": penalty,
               "update/skipped": float(not finite)}
    # Means over the tokens that were scored: rows without gradient were left out.
    return metrics | ({"logprob_drift": drift / max(scored, 1)} if on_policy else {"kl_old": kl_old / max(scored, 1)})
