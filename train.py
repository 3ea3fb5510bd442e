"""Train a language model with GRPO, and SCOPE's KL penalty on the few tokens that drive entropy collapse.

    torchrun train.py                                    # embedded default: toy model, Countdown; CPU, minutes
    torchrun train.py selection.strategy=none            # plain GRPO
    torchrun --nproc_per_node=4 train.py model=Qwen/Qwen2.5-1.5B gradient_checkpointing=true micro_batch_size=4 ...

One step, with the numbers that README and the comments below use:
  1 problems   2 rollouts   3 rewards   4 advantages   5 selection   6 update   7 log, evaluate, save
"""

import sys

import config as configs

if __name__ == "__main__":  # before torch is imported: a typo is told at once
    with configs.one_line_errors():
        KEYS = configs.training_keys(sys.argv[1:])

import copy
import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import distributed
import evaluate
import grpo
import rollout
import scope
import toy
from rollout import Rollout, hidden_states


class Objective(torch.nn.Module):
    """The loss of one micro-batch, as a module so that DDP sees every use of a weight in its forward.

    Both terms are sums over the micro-batch divided by counts over the whole step on all ranks (step 6),
    times the world size, for DDP averages gradients: however a step is cut up, its gradient is the same.
    """

    def __init__(self, policy, config, world_size: int):
        super().__init__()
        self.policy, self.config, self.world_size = policy, config, world_size

    def forward(self, batch, num_tokens: int, num_selected: int):
        config, head = self.config, self.policy.get_output_embeddings()
        hidden = hidden_states(self.policy, batch.tokens)[batch.predicts]  # [n, hidden size]

        def logprobs_of(hidden, targets):
            return grpo.token_logprobs(head(hidden), targets, temperature=config.temperature)

        def divergence(hidden, reference_hidden):
            logits, reference_logits = head(hidden), batch.reference_head(reference_hidden)
            return scope.kl_divergence(logits / config.temperature, reference_logits / config.temperature)

        logprobs = grpo.in_chunks(logprobs_of, hidden, batch.targets, size=config.logits_chunk)
        # One update per rollout: the policy is still the one that sampled, so the old log-probability is this one.
        old_logprobs, clip = logprobs.detach(), {"clip_low": config.grpo.clip_low, "clip_high": config.grpo.clip_high}
        loss = grpo.policy_loss(logprobs, old_logprobs, batch.advantages, **clip).sum() / num_tokens
        kl = torch.zeros((), device=loss.device)
        if batch.selected.any():
            kl = grpo.in_chunks(divergence, hidden[batch.selected], batch.reference_hidden, size=config.logits_chunk)
            kl = kl.sum() / num_selected
            loss = loss + config.selection.kl_coef * kl
        clip_frac = grpo.clipped(logprobs, old_logprobs, batch.advantages, **clip).sum() / num_tokens
        drift = (logprobs.detach() - batch.sampled_logprobs).abs().sum() / num_tokens
        return loss * self.world_size, torch.stack([loss.detach(), kl.detach(), clip_frac, drift])


@dataclass
class MicroBatch:
    """Some rows of this rank's rollout, packed (rollout.Rollout.pack); n valid completion tokens, flat."""

    tokens: Tensor  # [b, T]
    predicts: Tensor  # [b, T] bool, n of them
    targets: Tensor  # [n]
    sampled_logprobs: Tensor  # [n], recorded by the sampler
    advantages: Tensor  # [n]
    selected: Tensor  # [n] bool
    reference_hidden: Tensor | None  # [selected, hidden size], where any is selected
    reference_head: torch.nn.Module | None


def micro_batches(rollout: Rollout, advantages, selected, reference, size: int) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's share of the step in micro-batches of rows of similar length, and whether it is the last.

    Rows with neither an advantage nor a selected token are left out: their gradient is exactly 0. At
    least one micro-batch comes, whatever is left: every rank has to take part in DDP's one synchronised
    backward. The reference model runs only on rows that hold a selected token.
    """
    matters = (advantages != 0) | selected.any(dim=1)
    rows = matters.nonzero().squeeze(1).tolist() or [0]
    lengths = rollout.lengths.tolist()
    rows.sort(key=lambda row: (len(rollout.prompts[row]) + lengths[row], row))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        mask, chosen = rollout.mask[part], selected[part]
        tokens, predicts = rollout.pack(part)
        reference_hidden = head = None
        held = chosen.any(dim=1)
        if held.any():
            with torch.no_grad():
                hidden = hidden_states(reference, tokens[held])[predicts[held]]
            reference_hidden = hidden[chosen[held][mask[held]]]
            head = reference.get_output_embeddings()
        yield MicroBatch(
            tokens, predicts, rollout.tokens[part][mask], rollout.logprobs[part][mask],
            advantages[part][:, None].expand_as(mask)[mask], chosen[mask], reference_hidden, head,
        ), first + size >= len(rows)  # fmt: skip


def update(objective, optimizer, batches, *, num_tokens, num_selected, world, max_grad_norm) -> dict[str, float]:
    """Step 6: one optimizer step from the gradient of all micro-batches of all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(4, device=world.device)
    for batch, is_last in batches:
        alone = objective.no_sync() if hasattr(objective, "no_sync") and not is_last else nullcontext()
        with alone:
            with world.autocast():
                loss, parts = objective(batch, num_tokens, num_selected)
            loss.backward()
        sums += parts
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    loss, kl, clip_frac, drift = distributed.total(sums).tolist()
    if math.isfinite(grad_norm):
        optimizer.step()
    else:  # the same on every rank: gradients are averaged before this point
        tqdm.write(f"warning: the gradient is not finite ({grad_norm}); this update is skipped")
    return {"loss": loss, "grad_norm": float(grad_norm), "clip_frac": clip_frac, "kl/selected": kl,
            "logprob_drift": drift}  # fmt: skip


def learning_rate(step: int, *, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """The rate of step 0, 1, .. steps - 1: linear warm-up over a share of the steps, then constant or cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def step_problems(problems: list, step: int, *, count: int, seed: int) -> list:
    """The problems of a step: a new order each epoch, a pure function of (seed, epoch); the remainder is dropped."""
    per_epoch = len(problems) // count
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * count : (place + 1) * count]]


def roll_out(policy, tokenizer, stop: list[int], problems: list, step: int, config, world):
    """Steps 1-3 on this rank: its problems, `group_size` completions of each, and their rewards.

    Returns the rollout of B rows (row b answers problem b // group_size), its completions as text, and rewards [B].
    """
    # 1 problems: this rank's part of the step's
    drawn = step_problems(problems, step, count=config.prompts_per_step, seed=config.seed)
    mine = [drawn[i] for i in world.share(len(drawn)) for _ in range(config.group_size)]

    # 2 rollouts: rows are numbered over all ranks, so that their draws do not depend on the number of ranks
    prompts = rollout.encode_prompts(tokenizer, [data.render(problem, config.prompt) for problem in mine])
    rows = world.share(config.prompts_per_step * config.group_size)
    with world.autocast():
        sampled = rollout.sample(
            policy, prompts, list(rows), stop=stop, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, seed=config.seed, step=step,
            batch_size=config.rollout.batch_size, segment=config.rollout.segment,
        )  # fmt: skip

    # 3 rewards: one a completion
    texts = rollout.decode(tokenizer, sampled)
    rewards = [float(data.is_correct(problem, text)) for problem, text in zip(mine, texts)]
    return sampled, texts, torch.tensor(rewards, device=world.device)


def select(sampled: Rollout, advantages: Tensor, config, world, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step 5: which tokens pay the penalty, decided on the flat valid tokens of the whole step, all ranks.

    Returns this rank's selection [B, C], and for all ranks the tokens' (log p, entropy, advantage) [N, 3]
    and the selection [N].
    """
    mask = sampled.mask
    token_advantages = advantages[:, None].expand_as(mask)
    own = torch.stack([sampled.logprobs[mask], sampled.entropy[mask], token_advantages[mask]], dim=1)
    everyone = distributed.gather(own)
    logprobs, entropy, token_advantages = everyone.unbind(dim=1)
    chosen = scope.select_tokens(
        config.selection.strategy, fraction=config.selection.fraction,
        logprobs=logprobs, entropy=entropy, advantages=token_advantages, seed=config.seed * 1_000_003 + step,
    )  # fmt: skip
    counts = distributed.gather(torch.tensor([len(own)], device=world.device)).tolist()
    selected = torch.zeros_like(mask)
    selected[mask] = chosen.split(counts)[world.rank]
    return selected, everyone, chosen


def step_metrics(completions: Tensor, tokens: Tensor, chosen: Tensor, group_size: int) -> dict[str, float]:
    """Figures of a whole step, over all ranks.

    completions [B, 4]: reward, advantage, length, stopped. tokens [N, 3]: log p, entropy, advantage. chosen [N].
    """
    rewards, advantages, lengths, stopped = completions.unbind(dim=1)
    logprobs, entropy, token_advantages = tokens.unbind(dim=1)
    groups = rewards.view(-1, group_size)
    figures = {
        "reward/mean": rewards.mean(),
        "group/frac_zero_std": (groups.amax(dim=1) == groups.amin(dim=1)).float().mean(),
        "advantage/min": advantages.min(),
        "advantage/max": advantages.max(),
        "length/mean": lengths.mean(),
        "length/frac_truncated": 1 - stopped.mean(),
        "entropy": entropy.mean(),
        "tokens": len(tokens),
        "selection/fraction": chosen.float().mean(),
        "selection/candidates": (scope.redistribution_score(logprobs.exp(), token_advantages) > 0).float().mean(),
    }
    if chosen.any():
        figures |= {
            "selection/p": logprobs[chosen].exp().mean(),
            "selection/advantage": token_advantages[chosen].mean(),
            "selection/entropy": entropy[chosen].mean(),
        }
    return {name: float(value) for name, value in figures.items()}


def train(config, keys: dict, folder: Path, problems: list, heldout: list, world) -> None:
    """The whole run: base evaluation, the steps, the trained evaluation, and everything under `folder`."""
    policy, tokenizer = rollout.load(toy.model_folder(config))
    check_lengths(policy, tokenizer, problems + heldout, config)
    policy.to(world.device).train()  # dropout is off; train mode is what gradient checkpointing asks for
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reference = None
    if config.selection.strategy != "none":  # pi_ref: the initial model, frozen
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
    objective = Objective(policy, config, world.size)
    if torch.distributed.is_initialized():
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)
    optimizer = make_optimizer(policy, config)
    start = checkpoint.load(folder, policy, optimizer) if config.resume else 0
    stop = rollout.stop_ids(policy, tokenizer)
    say = tqdm.write if world.is_main else lambda text: None
    say(introduction(folder, policy, tokenizer, stop, problems, config, world))
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(configs.nest(keys), sort_keys=False))
        log = checkpoint.Log(folder, start)

    def run_evaluation(samples: int, title: str):
        return evaluate.evaluate(policy, tokenizer, heldout, world, config, samples=samples, title=title)

    stored = folder / "base_evaluation.npz"
    if start:
        configs.require(stored.is_file(), f"{stored} is missing: put it back, or start a run of another name=")
        base = evaluate.Evaluation.load(stored)
    else:
        base = run_evaluation(config.evaluation.samples, "evaluation of the base model")
        if world.is_main:
            base.save(stored)
            log.metrics({"step": 0, **evaluation_metrics(base)})

    for step in tqdm(range(start, config.steps), desc="training", initial=start, total=config.steps, unit="step",
                     disable=not world.is_main):  # fmt: skip
        clock = [time.perf_counter()]

        # 1-3 problems, rollouts, rewards
        sampled, texts, rewards = roll_out(policy, tokenizer, stop, problems, step, config, world)
        clock.append(time.perf_counter())

        # 4 advantages: groups are whole on a rank
        advantages = grpo.group_advantages(rewards, config.group_size, eps=config.grpo.advantage_eps)

        # 5 selection
        selected, tokens, chosen = select(sampled, advantages, config, world, step)
        clock.append(time.perf_counter())

        # 6 update
        rate = learning_rate(step, steps=config.steps, lr=config.optimizer.lr, schedule=config.optimizer.schedule,
                             warmup=config.optimizer.warmup)  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = micro_batches(sampled, advantages, selected, reference, config.micro_batch_size)
        updated = update(objective, optimizer, batches, num_tokens=len(tokens), num_selected=int(chosen.sum()),
                         world=world, max_grad_norm=config.optimizer.max_grad_norm)  # fmt: skip
        clock.append(time.perf_counter())

        # 7 log, evaluate, save
        own = torch.stack([rewards, advantages, sampled.lengths.float(), sampled.stopped.float()], dim=1)
        metrics = {"step": step + 1, **step_metrics(distributed.gather(own), tokens, chosen, config.group_size)}
        metrics |= updated | {"lr": rate, "mem_gb": memory(world)}
        metrics |= zip(("time/rollout", "time/select", "time/update"), np.diff(clock).tolist())
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
            metrics |= evaluation_metrics(run_evaluation(config.evaluation.samples_between, "evaluation"))
        if world.is_main:
            log.metrics(metrics)
            if (step + 1) % config.log_every == 0 or step == 0:
                say(f"step {step + 1}: reward {metrics['reward/mean']:.3f}, entropy {metrics['entropy']:.3f}, "
                    f"KL on selected {metrics['kl/selected']:.4f}, length {metrics['length/mean']:.1f}")
                for row in range(0, len(texts), config.group_size)[:2]:  # of two different problems
                    prompt = tokenizer.decode(sampled.prompts[row])
                    log.sample(step + 1, prompt, texts[row], rewards[row].item())
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            checkpoint.save(folder, step + 1, policy, tokenizer, optimizer)

    trained = run_evaluation(config.evaluation.samples, "evaluation of the trained model")
    if world.is_main:
        with checkpoint.replaced(folder / "model") as unfinished:
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        log.metrics({"step": config.steps, **evaluation_metrics(trained, base)})
        table = {"base": base.summary(base), "trained": trained.summary(base)}
        (folder / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n")
        say(f"\n{evaluate.format_table(table)}\n{evaluate.describe(trained)}\n\nwritten to {folder}/: config.yaml, "
            "metrics.jsonl (a line a step), samples.jsonl, evaluation.json, checkpoint/ (for resume=true), model/")


def introduction(folder: Path, policy, tokenizer, stop: list[int], problems: list, config, world) -> str:
    """What the run will do, in numbers, and what the model will see."""
    first_prompt = rollout.encode_prompts(tokenizer, [data.render(problems[0], config.prompt)])[0]
    completions = config.prompts_per_step * config.group_size
    return (f"{folder}: {config.prompts_per_step} problems x {config.group_size} = {completions} completions a step, "
            f"{completions // world.size} on each of {world.size} rank(s) of {world.device.type}; "
            f"{config.steps} steps = {config.steps / (len(problems) // config.prompts_per_step):.2f} epochs of "
            f"{len(problems)} problems; {sum(p.numel() for p in policy.parameters()):,} parameters\n"
            f"first prompt: {tokenizer.decode(first_prompt)!r}; stop ids: {stop}")


def evaluation_metrics(evaluation, base=None) -> dict[str, float]:
    return {f"eval/{name}": value for name, (value, _) in evaluation.summary(base).items()}


def memory(world) -> float:
    """Peak memory so far in GB: of the device, or of the process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def check_lengths(policy, tokenizer, problems, config) -> None:
    """Refuses prompts that leave no room for a completion in the model's context."""
    prompts = rollout.encode_prompts(tokenizer, [data.render(problem, config.prompt) for problem in problems])
    longest, context = max(map(len, prompts)), policy.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise configs.UserError(f"max_new_tokens={config.max_new_tokens}: with the longest prompt of {longest} tokens "
                                f"it does not fit the model's context of {context}; lower it to {context - longest}")


def make_optimizer(policy, config):
    settings = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
    if config.optimizer.zero and torch.distributed.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(policy.parameters(), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(policy.parameters(), **settings)


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    words = ", ".join(scope.STRATEGIES)
    configs.require(config.selection.strategy in scope.STRATEGIES,
                    f"selection.strategy={config.selection.strategy}: give one of {words}")
    folder = checkpoint.run_folder(config, keys)
    problems, heldout = data.training_problems(config), data.heldout_problems(
        config.evaluation.data, config.evaluation.problems, vars(config.countdown)
    )
    configs.require(len(problems) >= config.prompts_per_step,
                    f"prompts_per_step={config.prompts_per_step}: {config.data} has only {len(problems)} problems")
    world = distributed.setup()
    try:
        train(config, keys, folder, problems, heldout, world)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
