"""One training step: 1 problems, 2 rollouts, 3 rewards, 4 advantages, 5 selection, 6 update, in README's numbers.

`roll_out` is 1-3, `select` is 5, `update` is 6 with `micro_batches` and `Objective`; train.py puts them in a row.
Shapes: B completions of this rank, C their padded length; N valid tokens of an update, all ranks; n of a micro-batch.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import distributed
import grpo
import rollout
import scope
from config import print_notes, require
from rewards import REWARDS
from rollout import Rollout, hidden_states

# ---------------------------------------------------------------- 1-3


def step_problems(problems: list, step: int, *, count: int, seed: int) -> list:
    """The problems of a step: a new order each epoch, a pure function of (seed, epoch); the remainder is dropped."""
    epoch, place = divmod(step, len(problems) // count)
    order = np.random.default_rng([seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * count : (place + 1) * count]]


def prompt_ids(tokenizer, problems: list, config) -> list[list[int]]:
    """Token ids of the problems' prompts: the same in training, evaluation and analysis."""
    texts = [data.render(problem, config.prompt, chat=tokenizer.chat_template is not None) for problem in problems]
    return rollout.encode_prompts(tokenizer, texts, system=config.prompt.system)


def that_fit(shape, tokenizer, problems: list, config) -> list:
    """The problems that fit the context of a model with their completions; `shape` is its config."""
    room = shape.max_position_embeddings - config.max_new_tokens
    lengths = [len(ids) for ids in prompt_ids(tokenizer, problems, config)]
    kept = [problem for problem, length in zip(problems, lengths) if length <= room]
    told = (f"max_new_tokens={config.max_new_tokens}: with prompts of up to {max(lengths)} tokens {len(kept)} of "
            f"{len(problems)} problems fit the model's context of {shape.max_position_embeddings}")  # fmt: skip
    require(len(kept) >= config.prompts_per_step, f"{told}; lower it or shorten the prompt")
    print_notes([f"{told}; the others are left out of training"] * (len(kept) < len(problems)))
    return kept


def roll_out(policy, tokenizer, stop: list[int], problems: list, step: int, config, world):
    """Steps 1-3 on this rank: its problems, `group_size` completions of each, and their rewards.

    Returns the rollout (row b answers problem b // group_size), its texts, rewards [B] and correct [B] bool.
    """
    # 1 problems: of each update's part, this rank's share
    drawn = step_problems(problems, step, count=config.prompts_per_step, seed=config.seed)
    part = config.prompts_per_step // config.grpo.updates_per_rollout
    mine = [first + i for first in range(0, config.prompts_per_step, part) for i in world.share(part)]
    rows = [i * config.group_size + j for i in mine for j in range(config.group_size)]
    asked = [drawn[row // config.group_size] for row in rows]

    # 2 rollouts: rows are numbered over all ranks, so that their draws do not depend on the number of ranks
    prompts = prompt_ids(tokenizer, asked, config)
    with world.autocast():
        sampled = rollout.sample(
            policy, prompts, rows, stop=stop, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=config.seed, step=step, batch_size=config.rollout.batch_size, segment=config.rollout.segment,
            collision=config.selection.strategy == "entropy_change",
        )  # fmt: skip

    # 3 rewards: one a completion; with RLIF the grader's verdict is only logged
    texts = rollout.decode(tokenizer, sampled)
    verdicts = [data.is_correct(problem, text, config.reward.grader) for problem, text in zip(asked, texts)]
    correct = torch.tensor(verdicts, dtype=torch.bool, device=world.device) & sampled.stopped  # truncated: wrong
    return sampled, texts, REWARDS[config.reward.kind](correct, sampled), correct


# ---------------------------------------------------------------- 5


@dataclass
class Selection:
    """What step 5 decided, for this rank's rows [B, C] and, flat, for all ranks [N]."""

    selected: Tensor  # [B, C] bool: tokens that pay the KL penalty
    marked: Tensor  # [B, C] bool: tokens that the objective singles out
    flat: dict[str, Tensor]  # by name [N]: logprobs, entropy, advantages, collision, old_logprobs, selected, marked


def select(current: Rollout, old_logprobs: Tensor, advantages: Tensor, config, seed: int) -> Selection:
    """Step 5: decided on the flat valid tokens of all ranks, so that cutting up a step changes no choice.

    `current` holds the record of the current policy; old_logprobs [B, C] are those before the step's first update.
    """
    mask = current.mask
    names = ("logprobs", "entropy", "collision", "advantages", "old_logprobs")
    columns = [current.logprobs, current.entropy, current.collision, advantages[:, None].expand_as(mask), old_logprobs]
    own = torch.stack([column[mask] for column in columns], dim=1)
    counts = distributed.gather(torch.tensor([len(own)], device=own.device)).tolist()
    flat = dict(zip(names, distributed.gather(own).unbind(dim=1)))
    arguments = {name: flat[name] for name in ("logprobs", "entropy", "advantages", "collision")}
    arguments |= {"seed": seed, "forking_fraction": config.forking_fraction}
    flat["selected"] = scope.select_tokens(config.selection.strategy, fraction=config.selection.fraction, **arguments)
    flat["marked"] = MARKS[config.objective](flat, arguments, config)

    def own_part(chosen: Tensor) -> Tensor:
        part = torch.zeros_like(mask)
        part[mask] = chosen.split(counts)[distributed.rank()]
        return part

    return Selection(own_part(flat["selected"]), own_part(flat["marked"]), flat)


def no_marks(flat: dict, arguments: dict, config) -> Tensor:
    return torch.zeros_like(flat["selected"])


def forking_rl_marks(flat: dict, arguments: dict, config) -> Tensor:
    return scope.select_tokens("forking", fraction=config.forking_fraction, **arguments)


def kl_cov_marks(flat: dict, arguments: dict, config) -> Tensor:
    at_least_one = max(config.kl_cov.fraction, 1 / len(flat["selected"]))
    return scope.select_tokens("covariance", fraction=at_least_one, **arguments)


def clip_cov_marks(flat: dict, arguments: dict, config) -> Tensor:
    covariance = scope.covariance_score(flat["logprobs"], flat["advantages"])
    ratios = (flat["logprobs"], flat["old_logprobs"], flat["advantages"])
    low, high = grpo.CLIPS["clip_cov"]
    clipped = grpo.clipped(*ratios, clip_low=low, clip_high=high)
    return grpo.clip_cov_tokens(
        covariance, clipped, fraction=config.clip_cov.fraction, low=config.clip_cov.low, high=config.clip_cov.high,
        seed=arguments["seed"] ^ 0x9E3779B9,  # another draw than the selection's; torch seeds with 32 bits
    )  # fmt: skip


# The tokens that an objective singles out, of the same flat vectors: bool [N].
MARKS = {"grpo": no_marks, "div": no_marks, "forking_rl": forking_rl_marks, "kl_cov": kl_cov_marks,
         "clip_cov": clip_cov_marks}  # fmt: skip
MEAN_OVER_MARKED = {"forking_rl"}  # the others take their mean over all tokens
ALSO_PULLED = {  # rows that an objective pulls on even where the advantage is 0: (selection, correct) -> bool [B]
    "kl_cov": lambda selection, correct: selection.marked.any(dim=1),
    "div": lambda selection, correct: correct,
}


# ---------------------------------------------------------------- 6


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
    referred: Tensor  # [n] bool: tokens at which the reference is needed, m of them
    reference_hidden: Tensor | None  # [m, hidden size]
    reference_head: torch.nn.Module | None


def micro_batches(
    sampled: Rollout, advantages: Tensor, correct: Tensor, selection: Selection, reference, config, world
) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's rows in micro-batches of similar length, and whether each is the last.

    Rows that nothing pulls on are left out: their gradient is exactly 0. At least one micro-batch comes
    all the same: every rank has to take part in DDP's one synchronised backward. The reference model
    runs only on rows where it is needed.
    """
    mask, lengths = sampled.mask, sampled.lengths
    kept, num_kept = mask, len(selection.flat["marked"])
    if config.objective in MEAN_OVER_MARKED:
        kept, num_kept = selection.marked, int(selection.flat["marked"].sum())
    completions = float(distributed.total(torch.tensor(len(mask), device=mask.device)))
    sequence_weight = 1 / (lengths * completions)
    if config.grpo.normaliser == "sequence":
        weight = 1 / (kept.sum(dim=1).clamp(min=1) * completions)
    else:
        weight = torch.full_like(sequence_weight, 1 / max(num_kept, 1))

    everywhere = config.grpo.kl_coef > 0
    referred = mask if everywhere else selection.selected
    pulled = (advantages != 0) | referred.any(dim=1)
    if config.objective in ALSO_PULLED:
        pulled |= ALSO_PULLED[config.objective](selection, correct)
    if config.grpo.entropy_coef > 0:
        pulled[:] = True

    rows = pulled.nonzero().squeeze(1).tolist() or [0]
    sizes = [len(prompt) + length for prompt, length in zip(sampled.prompts, lengths.tolist())]
    rows.sort(key=lambda row: (sizes[row], row))
    for first in range(0, len(rows), config.micro_batch_size):
        part = rows[first : first + config.micro_batch_size]
        tokens, predicts = sampled.pack(part)
        valid = mask[part]
        reference_hidden, held = None, referred[part].any(dim=1)
        if held.any():
            with torch.no_grad(), world.autocast():
                states = hidden_states(reference, tokens[held])[predicts[held]]
            reference_hidden = states[referred[part][held][valid[held]]]

        def flat(values: Tensor, part=part, valid=valid) -> Tensor:
            values = values[part]
            return (values[:, None].expand_as(valid) if values.ndim == 1 else values)[valid]

        yield MicroBatch(
            tokens, predicts, flat(sampled.tokens), flat(sampled.logprobs), flat(advantages), flat(weight),
            flat(sequence_weight), flat(selection.marked), flat(correct), flat(selection.selected), flat(referred),
            reference_hidden, reference.get_output_embeddings() if reference is not None else None,
        ), first + config.micro_batch_size >= len(rows)  # fmt: skip


class Objective(torch.nn.Module):
    """The loss of one micro-batch, as a module so that DDP sees every use of a weight in its forward.

    Every term is a sum over the micro-batch divided by a count over the whole update on all ranks, times
    the world size, for DDP averages gradients: however an update is cut up, its gradient is the same.
    """

    def __init__(self, policy, config, world_size: int):
        super().__init__()
        self.policy, self.config, self.world_size = policy, config, world_size
        low, high = grpo.CLIPS.get(config.objective, (config.grpo.clip_low, config.grpo.clip_high))
        self.clips = {"clip_low": low, "clip_high": high}
        self.coef = {"div": config.div.coef, "kl_cov": config.kl_cov.coef}.get(config.objective, 0.0)

    def forward(self, batch: MicroBatch, num_tokens: int, num_selected: int, on_policy: bool):
        config, head, temperature = self.config, self.policy.get_output_embeddings(), self.config.temperature
        hidden = hidden_states(self.policy, batch.tokens)[batch.predicts]  # [n, hidden size]

        def chunks(function, *tensors):
            return grpo.in_chunks(function, *tensors, size=config.logits_chunk)

        logprobs = chunks(lambda h, y: grpo.token_logprobs(head(h), y, temperature=temperature), hidden, batch.targets)
        # Before the first update the policy is still the one that sampled: the ratio is 1, free of rounding.
        old_logprobs = logprobs.detach() if on_policy else batch.old_logprobs
        loss = grpo.OBJECTIVES[config.objective](
            grpo.Tokens(logprobs, old_logprobs, batch.advantages, batch.weight, batch.sequence_weight, batch.marked,
                        batch.correct), coef=self.coef, **self.clips)  # fmt: skip

        if config.grpo.entropy_coef > 0:
            entropy = chunks(lambda h: grpo.token_entropy(head(h), temperature=temperature), hidden)
            loss = loss - config.grpo.entropy_coef * entropy.sum() / num_tokens

        reference_logprobs = torch.zeros_like(batch.advantages)
        if batch.referred.any() and (config.grpo.kl_coef > 0 or config.selection.kl == "k3"):
            with torch.no_grad():
                reference_logprobs[batch.referred] = chunks(
                    lambda h, y: grpo.token_logprobs(batch.reference_head(h), y, temperature=temperature),
                    batch.reference_hidden, batch.targets[batch.referred])  # fmt: skip
        if config.grpo.kl_coef > 0:
            loss = loss + config.grpo.kl_coef * scope.k3(logprobs, reference_logprobs).sum() / num_tokens

        penalty = torch.zeros((), device=loss.device)
        if batch.selected.any():  # SCOPE's term, Eq. 15
            chosen = batch.selected
            if config.selection.kl == "k3":
                divergence = scope.k3(logprobs[chosen], reference_logprobs[chosen])
            else:
                divergence = chunks(
                    lambda h, r: scope.kl_divergence(head(h), batch.reference_head(r), temperature=temperature),
                    hidden[chosen], batch.reference_hidden[chosen[batch.referred]])  # fmt: skip
            penalty = divergence.sum() / num_selected
            loss = loss + config.selection.kl_coef * penalty

        held_back = grpo.clipped(logprobs, old_logprobs, batch.advantages, **self.clips).sum() / num_tokens
        moved = logprobs.detach() - batch.old_logprobs
        figures = [loss.detach(), penalty.detach(), held_back, moved.abs().sum(), (moved.exp() - moved - 1).sum(),
                   torch.tensor(float(len(moved)), device=loss.device)]  # fmt: skip
        return loss * self.world_size, torch.stack(figures)


def update(
    objective, optimizer, batches, selection: Selection, *, on_policy: bool, world, max_grad_norm: float
) -> dict[str, float]:
    """Step 6: one optimizer update from the gradient of all micro-batches of all ranks."""
    num_tokens, num_selected = len(selection.flat["selected"]), int(selection.flat["selected"].sum())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(6, device=world.device)
    for batch, is_last in batches:
        alone = objective.no_sync() if hasattr(objective, "no_sync") and not is_last else nullcontext()
        with alone:
            with world.autocast():
                loss, figures = objective(batch, num_tokens, num_selected, on_policy)
            loss.backward()
        sums += figures
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    loss, penalty, clip_frac, drift, kl_old, scored = distributed.total(sums).tolist()
    if math.isfinite(grad_norm):
        optimizer.step()
    else:  # the same on every rank: gradients are averaged before this point
        if world.is_main:
            tqdm.write(f"warning: the gradient is not finite ({grad_norm}); this update is skipped")
    figures = {"loss": loss, "grad_norm": grad_norm, "clip_frac": clip_frac, "kl/selected": penalty}
    # Means over the tokens that were scored: rows that nothing pulls on were left out.
    return figures | ({"logprob_drift": drift / max(scored, 1)} if on_policy else {"kl_old": kl_old / max(scored, 1)})


@torch.no_grad()
def rescore(policy, sampled: Rollout, config, world) -> Rollout:
    """The rollout with the current policy's record: what step 5 looks at after a first update."""
    fresh = {name: torch.zeros_like(getattr(sampled, name)) for name in ("logprobs", "entropy", "collision")}
    head, temperature = policy.get_output_embeddings(), config.temperature

    def record(hidden, targets):
        logits = head(hidden)
        return torch.stack([grpo.token_logprobs(logits, targets, temperature=temperature),
                            grpo.token_entropy(logits, temperature=temperature),
                            grpo.token_collision(logits, temperature=temperature)], dim=1)  # fmt: skip

    for first in range(0, len(sampled.mask), config.micro_batch_size):
        rows = list(range(first, min(first + config.micro_batch_size, len(sampled.mask))))
        tokens, predicts = sampled.pack(rows)
        mask = sampled.mask[rows]
        with world.autocast():
            hidden = hidden_states(policy, tokens)[predicts]
            values = grpo.in_chunks(record, hidden, sampled.tokens[rows][mask], size=config.logits_chunk)
        for name, column in zip(fresh, values.unbind(dim=1)):
            fresh[name][first : first + len(rows)][mask] = column
    return Rollout(**vars(sampled) | fresh)


# ---------------------------------------------------------------- 7


def selection_metrics(flat: dict[str, Tensor], config) -> dict[str, float]:
    """Which tokens were taken, over all ranks."""
    chosen = flat["selected"]
    scores = scope.redistribution_score(flat["logprobs"].exp(), flat["advantages"])
    figures = {
        "selection/fraction": chosen.float().mean(),
        "selection/candidates": (scores > 0).float().mean(),
        "objective/marked": flat["marked"].float().mean(),
    }
    if config.selection.strategy not in ("none", "all"):
        figures["selection/shortfall"] = round(config.selection.fraction * len(chosen)) - chosen.sum()
    if chosen.any():
        figures |= {
            "selection/p": flat["logprobs"][chosen].exp().mean(),
            "selection/advantage": flat["advantages"][chosen].mean(),
            "selection/negative": (flat["advantages"][chosen] < 0).float().mean(),
            "selection/entropy": flat["entropy"][chosen].mean(),
        }
    return {name: float(value) for name, value in figures.items()}


def rollout_metrics(sampled: Rollout, rewards: Tensor, correct: Tensor, advantages: Tensor, group_size: int) -> dict:
    """Figures of the step's rollouts, over all ranks; groups are whole on a rank."""
    columns = [rewards, correct.float(), advantages, sampled.lengths.float(), sampled.stopped.float()]
    rewards, correct, advantages, lengths, stopped = distributed.gather(torch.stack(columns, dim=1)).unbind(dim=1)
    entropy = distributed.gather(sampled.entropy[sampled.mask])
    groups = rewards.view(-1, group_size)
    figures = {
        "reward/mean": rewards.mean(),
        "reward/accuracy": correct.mean(),
        "group/frac_zero_std": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
        "advantage/min": advantages.min(),
        "advantage/max": advantages.max(),
        "length/mean": lengths.mean(),
        "length/frac_truncated": 1 - stopped.mean(),
        "entropy": entropy.mean(),
        "tokens": len(entropy),
    }
    return {name: float(value) for name, value in figures.items()}
