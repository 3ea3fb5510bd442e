"""Train a language model with GRPO and SCOPE's KL penalty on a few tokens.

    python train.py                                 # the default: toy model, Countdown, CPU
    python train.py selection.strategy=none         # plain GRPO
    torchrun --nproc_per_node=4 train.py recipe=recipes/qwen2.5-1.5b.yaml

`train` is the loop. One step has seven parts, with the same numbers here, in the comments and in
README.md: 1 problems  2 rollouts  3 rewards  4 advantages  5 selection  6 update  7 log, evaluate,
save

Shapes: B is the number of completions of this rank, C their padded length, N the number of valid
(unpadded) completion tokens of an update over all ranks, n that of a micro-batch.
"""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# Waiting threads of torch must sleep, not spin: on a busy machine spinning stops all the others.
# torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import grpo
import scope
import toy
from evaluate import Evaluation, caption, compare, evaluate, evaluation_metrics, metrics_table
from objectives import OBJECTIVES, MicroBatch
from rewards import REWARDS, check_grader, grade
from rollout import Rollout, rescore, sample, sampling_settings
from support import checkpoint, distributed, memory, models
from support.config import (
    RunError,
    flatten,
    load_config,
    lookup,
    one_line_errors,
    read_defaults,
    require,
    show_help,
)
from support.distributed import StopSignal, World, note
from support.files import fingerprint, lock, replace_folder, replace_text
from support.log import Log, open_run_folder
from support.optimizer import MasterAdamW


@dataclass
class Run:
    """Holds everything that a training run works with; `set_up` makes it."""

    config: SimpleNamespace
    world: World
    folder: Path
    policy: torch.nn.Module
    tokenizer: object
    stop: list[int]  # token ids that end a completion
    problems: list[dict]  # to train on
    heldout: dict[str, list[dict]]  # to evaluate on, by file
    reference: torch.nn.Module | None  # pi_ref, the frozen initial model; None: never needed
    loss: torch.nn.Module  # MicroBatchLoss, under DistributedDataParallel with torchrun
    optimizer: torch.optim.Optimizer
    fingerprints: dict[str, str]  # hashes of model, data ...; a resumed run must have the same


def train(run: Run, log: Log, start: int, base: dict[str, Evaluation]) -> None:
    """Run the training steps from `start` on; see the module docstring for the seven parts.

    `base` is the evaluation of the base model on every held-out file.
    """
    config = run.config
    world = run.world
    stop_signal = StopSignal()
    bad_steps = 0
    remaining = range(start, config.steps)
    for step in tqdm(
        remaining, "training", initial=start, total=config.steps, disable=world.hide_bar
    ):
        clock = Stopwatch()

        # 1 problems of this rank, each group_size times; `rows` are numbers within the step
        problems, rows = draw_problems(run.problems, step, config, world)

        # 2 rollouts: a completion per row, with log-probability and entropy of every token
        prompts = data.prompt_ids(run.tokenizer, problems, config.prompt)
        settings = sampling_settings(config)
        with world.autocast():
            rollout = sample(
                run.policy, prompts, rows, stop=run.stop, seed=config.seed, step=step, **settings
            )

        # 3 rewards [B]: the grader's verdict (RLVR), or the model's own confidence (RLIF)
        rollout.correct, texts = grade(run.tokenizer, problems, rollout, config.grader)
        rollout.rewards = REWARDS[config.reward].function(rollout)
        clock.lap("rollout")

        # 4 advantages [B]: rewards normalised within the group of each problem (Eq. 18)
        rollout.advantages = grpo.group_advantages(rollout.rewards, config.group_size)

        if config.updates_per_rollout > 1:
            # record the log-probs of the training forward, so that ratios contain no rounding of
            # the KV cache
            rollout = rescore(run.policy, rollout, config, world)
        rate = learning_rate(step, config)
        set_learning_rate(run.optimizer, rate)
        updates = []
        for i, mini_batch in enumerate(rollout.split(config.updates_per_rollout)):
            # 5 selection [B, C]: the K tokens with the highest p (1 - p) max(A, 0) (Eq. 11-13)
            current = mini_batch
            if i > 0:  # the policy has changed since the rollout
                current = rescore(run.policy, mini_batch, config, world)
            seed = (config.seed * 1_000_003 + step) * config.updates_per_rollout + i
            mini_batch.selected, mini_batch.token_mask, selection = select(
                current, mini_batch, config, world, seed
            )
            clock.lap("select")

            # 6 update: policy loss + lambda * KL(policy || initial model) on the selected (Eq. 15)
            updates.append(update(run, mini_batch, on_policy=i == 0) | selection)
            clock.lap("update")

        # 7 log, evaluate, save
        metrics = rollout_metrics(rollout, config, world) | average(updates)
        metrics |= {"lr": rate, "mem_gb": world.peak_memory()} | clock.times
        log.metrics(step + 1, metrics)
        if step == 0 or (step + 1) % config.log_every == 0:
            print_step(log, step + 1, metrics, run, rollout, texts)
        bad_steps = bad_steps + 1 if metrics["update/skipped"] == 1 else 0
        if bad_steps == config.max_bad_steps:
            raise RunError(
                f"step {step + 1}: no finite loss and gradient in {bad_steps} steps in a row: "
                f"lower optimizer.lr={config.optimizer.lr}; the last checkpoint is older"
            )
        last = step + 1 == config.steps
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and not last:
            first_file = next(iter(run.heldout))
            results = evaluate_policy(run, [first_file], config.evaluation.samples_between)
            log.metrics(step + 1, evaluation_metrics(results, base))
        # one rank may get the signal a step before the others: all stop together
        stop_number = world.max(stop_signal.number)
        # not after a bad step: a run resumed from it would fail again
        due = (step + 1) % config.save_every == 0 and bad_steps == 0
        if stop_number or last or due:
            checkpoint.save(run, step + 1)
        if stop_number:
            log.print(
                f"stopped by a signal; step {step + 1} is saved; to continue: train.py "
                f"name={run.folder.name} resume=true"
            )
            raise SystemExit(128 + stop_number)
    stop_signal.restore()


# ---------------------------------------------------------------- 1 problems


def draw_problems(
    problems: list[dict], step: int, config, world: World
) -> tuple[list[dict], list[int]]:
    """Return the problem of each of this rank's B completions, and its row within the step.

    The order of problems is new in each epoch and depends only on (seed, epoch); the remainder of
    an epoch is dropped. With several updates per rollout each update learns from its own part of
    the problems, and a rank has a share of every part. The completions of a problem (a group) are
    always on the same rank.
    """
    count = config.prompts_per_step
    epoch, position = divmod(step, len(problems) // count)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(problems))
    indices = order[position * count : (position + 1) * count]
    per_update = count // config.updates_per_rollout
    rows = []
    for first in range(0, count, per_update):
        for i in world.slice(per_update):
            rows += [(first + i) * config.group_size + j for j in range(config.group_size)]
    return [problems[indices[row // config.group_size]] for row in rows], rows


# ---------------------------------------------------------------- 5 selection


def select(
    current: Rollout, rollout: Rollout, config, world: World, seed: int
) -> tuple[Tensor, Tensor, dict]:
    """Select the tokens that pay the KL penalty, from the flat valid tokens of all ranks.

    Because the tokens of the whole update are compared, neither ranks nor micro-batches change the
    selection. `current` has the log-probabilities and entropies of the current policy, `rollout`
    those from before the first update. Returns selected [B, C], token_mask [B, C], which marks the
    tokens that the objective treats specially, and metrics.
    """
    mask = current.mask
    columns = {
        "logprobs": current.logprobs,
        "entropy": current.entropy,
        "entropy_baseline": current.entropy_baseline,
        "advantages": current.advantages[:, None].expand_as(mask),
        "old_logprobs": rollout.logprobs,
    }
    of_this_rank = torch.stack([column[mask].float() for column in columns.values()], dim=1)
    tokens = dict(zip(columns, world.gather(of_this_rank).unbind(dim=1)))  # each [N]
    old_logprobs = tokens.pop("old_logprobs")
    selected = scope.select_tokens(
        config.selection.strategy,
        fraction=config.selection.fraction,
        forking_fraction=config.forking_fraction,
        seed=seed,
        **tokens,
    )
    token_mask = OBJECTIVES[config.objective].token_mask(tokens, old_logprobs, config, seed)
    counts = world.gather(torch.tensor([len(of_this_rank)], device=mask.device)).tolist()
    selected_here = torch.zeros_like(mask)
    selected_here[mask] = selected.split(counts)[world.rank]
    token_mask_here = torch.zeros_like(mask)
    token_mask_here[mask] = token_mask.split(counts)[world.rank]
    return selected_here, token_mask_here, selection_metrics(tokens, selected, token_mask)


# ---------------------------------------------------------------- 6 update


def update(run: Run, rollout: Rollout, *, on_policy: bool) -> dict[str, float]:
    """Take one optimizer step on a rollout, in micro-batches.

    Every sum is divided by a count over the whole update on all ranks, so that the gradient does
    not depend on how the update is cut into micro-batches and ranks. on_policy: the policy is still
    the one that sampled.
    """
    config = run.config
    world = run.world
    objective = OBJECTIVES[config.objective]
    counted = rollout.mask
    if objective.mean_over_mask:
        counted = rollout.token_mask
    counts = [
        counted.sum(),
        rollout.mask.sum(),
        rollout.selected.sum(),
        torch.tensor(len(rollout.prompts), device=counted.device),
    ]
    num_counted, num_tokens, num_selected, num_completions = world.sum(torch.stack(counts)).tolist()
    sequence_weight = 1 / (rollout.lengths * float(num_completions))
    weight = torch.full_like(sequence_weight, 1 / max(num_counted, 1))
    if config.grpo.normaliser == "sequence":
        weight = 1 / (counted.sum(dim=1).clamp(min=1) * float(num_completions))

    has_gradient = (rollout.advantages != 0) | rollout.selected.any(dim=1)
    if objective.learns_from_correct:
        has_gradient |= rollout.correct
    if objective.learns_from_mask:
        has_gradient |= rollout.token_mask.any(dim=1)
    rows = has_gradient.nonzero().squeeze(1).tolist()
    # every rank needs one backward, or the others wait for ever
    batches = rollout.micro_batches(config, rows) or [[0]]

    reference = reference_states(run.reference, rollout, config, world)
    run.optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets
    sums: dict[str, Tensor] = {}
    for i, batch_rows in enumerate(batches):
        # DDP: ranks exchange gradients once, in the last backward
        run.loss.require_backward_grad_sync = i == len(batches) - 1
        batch = rollout.collate(batch_rows, weight, sequence_weight)
        with world.autocast():
            loss, batch_sums = run.loss(batch, reference, num_tokens, num_selected, on_policy)
        (loss * world.size).backward()  # DDP averages gradients over ranks: undo that
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0) + value

    totals = dict(zip(sums, world.sum(torch.stack(list(sums.values()))).tolist()))
    loss = totals["loss"]
    grad_norm = clip_gradients(run.optimizer, config.optimizer.max_grad_norm)
    finite = math.isfinite(grad_norm) and math.isfinite(loss)  # the same on every rank
    if finite:
        run.optimizer.step()
    else:
        note(f"loss {loss} or gradient norm {grad_norm} is not finite; the update is skipped")
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "clip_frac": totals["clip_frac"],
        "kl/selected": totals["kl"],
        "update/skipped": float(not finite),
    }
    if on_policy:
        # between the sampler and the training forward only rounding differs
        return metrics | {"logprob_drift": totals["drift"] / max(totals["tokens"], 1)}
    return metrics | {"kl_old": totals["kl_old"] / max(totals["tokens"], 1)}


class MicroBatchLoss(torch.nn.Module):
    """Computes the loss of a micro-batch; it is a module so that DDP sees every use of a weight."""

    def __init__(self, policy: torch.nn.Module, config):
        super().__init__()
        self.policy = policy
        self.config = config
        self.objective = OBJECTIVES[config.objective]
        clip_low, clip_high = self.objective.clip or (config.grpo.clip_low, config.grpo.clip_high)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}

    def forward(
        self, batch: MicroBatch, reference, num_tokens: int, num_selected: int, on_policy: bool
    ):
        """Return the loss, to be minimised, and sums for the metrics of `update`."""
        config = self.config
        head = self.policy.get_output_embeddings()
        hidden = models.hidden_states(self.policy, batch.tokens)
        hidden = hidden[batch.predicts_completion]  # [n, hidden size]

        def logprobs_of(hidden: Tensor, targets: Tensor) -> Tensor:
            return grpo.token_logprobs(head(hidden), targets, temperature=config.temperature)

        logprobs = grpo.in_chunks(logprobs_of, hidden, batch.targets, size=config.logits_chunk)
        old_logprobs = batch.old_logprobs
        if on_policy:  # the ratio is then exactly 1, free of rounding
            old_logprobs = logprobs.detach()
        loss = self.objective.loss(logprobs, old_logprobs, batch, **self.clip).sum()

        kl = torch.zeros((), device=loss.device)
        if batch.selected.any():  # SCOPE's term (Eq. 14-15)

            def kl_of(hidden: Tensor, states: Tensor) -> Tensor:
                logits = head(hidden)
                reference_logits = reference.head(states)
                return scope.kl_divergence(logits, reference_logits, temperature=config.temperature)

            selected_hidden = hidden[batch.selected]
            states = reference.states_of(batch.rows)
            kl = grpo.in_chunks(kl_of, selected_hidden, states, size=config.logits_chunk)
            kl = kl.sum() / num_selected
            loss = loss + config.selection.kl_coef * kl

        clipped = grpo.clipped(logprobs, old_logprobs, batch.advantages, **self.clip)
        change = logprobs.detach() - batch.old_logprobs
        sums = {
            "loss": loss.detach(),
            "kl": kl.detach(),
            "clip_frac": clipped.sum() / num_tokens,
            "drift": change.abs().sum(),
            "kl_old": (change.exp() - change - 1).sum(),  # estimates KL(pi_old || pi) by k3
            "tokens": torch.tensor(float(len(change)), device=loss.device),
        }
        return loss, sums


class ReferenceStates(NamedTuple):
    """Holds what the KL needs of the reference model: vocabulary projection and hidden states."""

    head: torch.nn.Module
    hidden: dict[int, Tensor]  # row -> [selected tokens of the row, hidden size]

    def states_of(self, rows: list[int]) -> Tensor:
        """Return the hidden states at the selected tokens of some rows, in order."""
        return torch.cat([self.hidden[row] for row in rows if row in self.hidden])


@torch.no_grad()
def reference_states(reference, rollout: Rollout, config, world: World) -> ReferenceStates | None:
    """Return the reference model's hidden states at the selected tokens, or None without any."""
    rows = rollout.selected.any(dim=1).nonzero().squeeze(1).tolist()
    if not rows:
        return None
    hidden: dict[int, Tensor] = {}
    with models.on_device(reference, world.device), world.autocast():
        for batch_rows in rollout.micro_batches(config, rows):
            tokens, predicts_completion = rollout.pad(batch_rows)
            selected = rollout.selected[batch_rows]
            states = models.hidden_states(reference, tokens)[predicts_completion]
            states = states[selected[rollout.mask[batch_rows]]]
            hidden |= zip(batch_rows, states.split(selected.sum(dim=1).tolist()))
    return ReferenceStates(reference.get_output_embeddings(), hidden)


def clip_gradients(optimizer, max_norm: float) -> float:
    """Clip the gradient norm to `max_norm`; return the norm before clipping, computed in fp32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norms = []
    for parameter in parameters:
        dtype = torch.promote_types(parameter.grad.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype))
    norm = torch.stack(norms).norm()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def learning_rate(step: int, config) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or cosine to 0."""
    lr = config.optimizer.lr
    warmup = round(config.optimizer.warmup * config.steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if config.optimizer.schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def set_learning_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---------------------------------------------------------------- 7 metrics and evaluations


class Stopwatch:
    """Measures seconds per phase of a step, logged as time/NAME."""

    def __init__(self):
        self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + now - self.last
        self.last = now


def rollout_metrics(rollout: Rollout, config, world: World) -> dict[str, float]:
    """Return the metrics of a step's rollouts, over all ranks."""
    columns = [
        rollout.rewards,
        rollout.correct.float(),
        rollout.lengths.float(),
        rollout.stopped.float(),
    ]
    rewards, correct, lengths, stopped = world.gather(torch.stack(columns, dim=1)).unbind(dim=1)
    entropy = world.gather(rollout.entropy[rollout.mask])
    groups = rewards.view(-1, config.group_size)  # a group is never split over ranks
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/accuracy": correct.mean(),
        "group/frac_zero_std": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
        "length/mean": lengths.mean(),
        "length/frac_truncated": 1 - stopped.mean(),
        "entropy": entropy.mean(),
        "tokens": len(entropy),
    }
    return {name: float(value) for name, value in metrics.items()}


def selection_metrics(
    tokens: dict[str, Tensor], selected: Tensor, token_mask: Tensor
) -> dict[str, float]:
    """Describe which of the step's N tokens were selected, over all ranks."""
    scores = scope.redistribution_score(tokens["logprobs"].exp(), tokens["advantages"])
    metrics = {
        "selection/fraction": selected.float().mean(),
        "selection/candidates": (scores > 0).float().mean(),
        "objective/fraction": token_mask.float().mean(),
    }
    if selected.any():
        metrics |= {
            "selection/p": tokens["logprobs"][selected].exp().mean(),
            "selection/advantage": tokens["advantages"][selected].mean(),
            "selection/negative": (tokens["advantages"][selected] < 0).float().mean(),
            "selection/entropy": tokens["entropy"][selected].mean(),
        }
    return {name: float(value) for name, value in metrics.items()}


def average(updates: list[dict[str, float]]) -> dict[str, float]:
    """Average each metric over the updates of a step that have it."""
    names = dict.fromkeys(name for metrics in updates for name in metrics)
    means = {}
    for name in names:
        values = [metrics[name] for metrics in updates if name in metrics]
        means[name] = sum(values) / len(values)
    return means


def print_step(
    log: Log, step: int, metrics: dict, run: Run, rollout: Rollout, texts: list[str]
) -> None:
    """Print a line of metrics and, for each of two problems, one completion."""
    line = (
        f"step {step}: reward {metrics['reward/mean']:.3f}, "
        f"accuracy {metrics['reward/accuracy']:.3f}, entropy {metrics['entropy']:.3f}, "
        f"length {metrics['length/mean']:.1f}"
    )
    if metrics["selection/fraction"] > 0:
        line += f", KL on selected tokens {metrics['kl/selected']:.4f}"
    log.print(line)
    if metrics["group/frac_zero_std"] == 1:
        log.print("  in every group all rewards are equal: this step teaches nothing")
    if metrics["length/frac_truncated"] > 0.5:
        log.print(
            f"  warning: {metrics['length/frac_truncated']:.0%} of completions are truncated: "
            f"raise max_new_tokens={run.config.max_new_tokens}, or see docs/questions.md"
        )
    for row in range(0, len(texts), run.config.group_size)[:2]:
        log.sample(
            step,
            run.tokenizer.decode(rollout.prompts[row]),
            texts[row],
            rollout.rewards[row].item(),
        )


def evaluate_policy(
    run: Run, files: Iterable[str], samples: int, folder: Path | None = None
) -> dict[str, Evaluation]:
    """Evaluate the current policy on some of the held-out files; `folder` is as in `evaluate`."""
    results = {}
    for file in files:
        results[file] = evaluate(
            run.policy,
            run.tokenizer,
            run.heldout[file],
            run.config,
            run.world,
            samples=samples,
            seed=run.config.evaluation.seed,
            title=f"evaluation on {file}",
            folder=folder,
        )
    return results


def finish(run: Run, log: Log, base: dict[str, Evaluation]) -> None:
    """Evaluate and save the trained model; print a table that compares it with the base model."""
    config = run.config
    trained = evaluate_policy(run, run.heldout, config.evaluation.samples)
    if not run.world.is_main:
        return
    log.metrics(config.steps, evaluation_metrics(trained, base))
    with replace_folder(run.folder / "model") as unfinished:
        run.policy.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
    report = {}
    for file, result in trained.items():
        models = {"base": base[file], "trained": result}
        report[file] = compare(models)
        table = metrics_table(report[file])
        log.print(f"\n{file}:\n\n{table}\n{caption(*result.correct.shape, config.temperature)}\n")
        correct = {name: model.correct.sum(axis=1).tolist() for name, model in models.items()}
        report[file] |= {"samples": config.evaluation.samples, "correct": correct}
    replace_text(run.folder / "evaluation.json", json.dumps(report, indent=1) + "\n")
    log.print(
        f"written to {run.folder}/: config.yaml, metrics.jsonl (a line a step), "
        "samples.jsonl, evaluation.json, checkpoints/ (for resume=true), model/"
    )


# ---------------------------------------------------------------- the command


def check_methods(config) -> None:
    """Raise UserError if a chosen method does not exist or the settings do not go together."""
    reward = lookup("reward", config.reward, REWARDS)
    objective = lookup("objective", config.objective, OBJECTIVES)
    strategy = lookup("selection.strategy", config.selection.strategy, scope.STRATEGIES)
    check_grader(config.grader)
    require(
        reward.verifiable or not objective.learns_from_correct,
        f"objective={config.objective} with reward={config.reward}: this objective uses which "
        "completions are correct, so it needs reward=accuracy",
    )
    require(
        config.selection.kl_coef > 0 or not strategy.selects,
        "selection.kl_coef=0: the selected tokens would pay nothing; give more, or "
        "selection.strategy=none",
    )
    divisor = distributed.num_ranks() * config.updates_per_rollout
    require(
        config.prompts_per_step % divisor == 0,
        f"prompts_per_step={config.prompts_per_step}: give a multiple of {divisor}, the number of "
        "ranks times updates_per_rollout",
    )
    if objective.needs_several_updates and config.updates_per_rollout == 1:
        note(
            f"objective={config.objective} has no effect with one update per rollout, because its "
            "penalty is to the policy that sampled; give updates_per_rollout=2 or more"
        )


def set_up(config, world: World, folder: Path) -> Run:
    """Load the problems and the model, and make the reference model, the loss and the optimizer."""
    problems, heldout = data.load_problems(config)
    policy, tokenizer = models.load(toy.resolve_model(config, world), world.dtype)
    policy.to(world.device)
    problems = data.drop_long_prompts(
        problems, tokenizer, policy.config.max_position_embeddings, config
    )
    stop = models.stop_ids(policy, tokenizer)
    models.set_stop(policy, stop)
    policy.train()  # there is no dropout; gradient checkpointing needs train mode
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    reference = None
    if scope.STRATEGIES[config.selection.strategy].selects:
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
        if config.offload:
            models.offload_weights(reference)
    # gradients are allocated only here, because DDP turns them into views of its buckets
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = world.ddp(MicroBatchLoss(policy, config))
    optimizer = MasterAdamW(
        policy.named_parameters(),
        world,
        lr=config.optimizer.lr,
        offload=config.offload,
        weight_decay=config.optimizer.weight_decay,
    )
    prompts = [data.prompt_ids(tokenizer, file, config.prompt) for file in heldout.values()]
    fingerprints = {
        "the model": models.fingerprint(policy),
        "the training problems": fingerprint(problems),
        "evaluation.data": fingerprint(heldout),
        "the tokenizer": fingerprint([prompts, stop]),
        "precision": str(world.dtype),
    }
    return Run(
        config,
        world,
        folder,
        policy,
        tokenizer,
        stop,
        problems,
        heldout,
        reference,
        loss,
        optimizer,
        fingerprints,
    )


def describe(
    config, model, tokenizer, problems: list[dict], heldout: dict[str, list[dict]], ranks: int
) -> str:
    """Describe a run in numbers, with its settings and what the model will see."""
    completions = config.prompts_per_step * config.group_size
    epoch = len(problems) // config.prompts_per_step
    evaluated = sum(map(len, heldout.values())) * config.evaluation.samples
    prompt = data.prompt_ids(tokenizer, problems[:1], config.prompt)[0]
    parameters = sum(p.numel() for p in model.parameters())
    defaults = read_defaults()
    changed = [f"{key}={value}" for key, value in flatten(config).items() if value != defaults[key]]
    changed = [setting.replace("\n", "\\n") for setting in changed]  # a prompt may have lines
    return (
        f"settings other than in config.yaml: {', '.join(changed) or 'none'}\n"
        f"model: {parameters:,} parameters, vocabulary {model.config.vocab_size:,}, "
        f"context {model.config.max_position_embeddings:,}\n"
        f"first prompt: {tokenizer.decode(prompt)!r}; stop ids: "
        f"{models.describe_ids(models.stop_ids(model, tokenizer), tokenizer)}\n"
        f"a step: {config.prompts_per_step} problems x {config.group_size} = {completions} "
        f"completions of up to {config.max_new_tokens} tokens, {completions // ranks} of them "
        f"on each of {ranks} rank(s); {config.updates_per_rollout} update(s)\n"
        f"{config.steps} steps = {config.steps / epoch:.2f} epochs of {len(problems):,} problems; "
        f"{evaluated:,} completions in each evaluation before and after training"
    )


def dry_run(config) -> None:
    """Print what the run would be, with its memory; load no weights and write nothing."""
    ranks = distributed.num_ranks()
    problems, heldout = data.load_problems(config)
    model, tokenizer = toy.blank_model(config)
    problems = data.drop_long_prompts(
        problems, tokenizer, model.config.max_position_embeddings, config
    )
    evaluated = [problem for file in heldout.values() for problem in file]
    prompts = data.prompt_ids(tokenizer, problems + evaluated, config.prompt)
    models.check_lengths(model.config, prompts, config.max_new_tokens)
    strategy = scope.STRATEGIES[config.selection.strategy]
    estimate = memory.estimate(
        model.config,
        sum(p.numel() for p in model.parameters()),
        config,
        ranks=ranks,
        prompt=max(map(len, prompts)),
        precision="fp32" if config.precision == "fp32" else "bf16",
        reference=strategy.selects,
        all_selected=strategy.fraction == 1,
    )
    print(describe(config, model, tokenizer, problems, heldout, ranks))
    print(memory.table(estimate))


def run_training(run: Run, resume: bool) -> None:
    """Restore the last checkpoint of a run, train, and evaluate before and after."""
    config = run.config
    world = run.world
    saved = checkpoint.latest(run.folder) if resume else None
    require(
        saved is not None or config.resume is not True,
        f"resume=true: {run.folder} has no checkpoint yet; delete it and start again, or give "
        "resume=auto",
    )
    # before a checkpoint is loaded the policy is the base model, which runs with other seeds share
    stored = Path("runs/base-evaluations")
    base = evaluate_policy(run, run.heldout, config.evaluation.samples, stored)
    start = 0
    if saved is not None:
        start = checkpoint.load(run, saved)
    log = Log(run.folder, config, start, active=world.is_main)
    text = describe(config, run.policy, run.tokenizer, run.problems, run.heldout, world.size)
    log.print(f"{run.folder}: {text}")
    if start == 0:
        log.metrics(0, evaluation_metrics(base))
    train(run, log, start, base)
    finish(run, log, base)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    config = load_config(arguments)
    check_methods(config)
    if config.dry_run:
        dry_run(config)
        return
    folder, resume = open_run_folder(config)
    if resume and (folder / "evaluation.json").exists():
        note(f"{folder} is finished; evaluation.json has its table")
        return
    with distributed.start(config.precision, config.distributed_timeout) as world:
        run = set_up(config, world, folder)
        with lock(folder / "lock") if world.is_main else nullcontext():
            run_training(run, resume)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
