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
import os
import resource
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import distributed
import dry_run
import evaluate
import grpo
import rewards
import rollout
import scope
import step as steps
import toy


def learning_rate(step: int, *, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """The rate of step 0, 1, .. steps - 1: linear warm-up over a share of the steps, then constant or cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def train(config, keys: dict, folder: Path, problems: list, heldout: list, world) -> None:
    """The whole run: base evaluation, the steps, the trained evaluation, and everything under `folder`."""
    policy, tokenizer = rollout.load(toy.model_folder(config.model, config))
    problems = steps.that_fit(policy.config, tokenizer, problems, config)
    rollout.check_lengths(policy.config, steps.prompt_ids(tokenizer, heldout, config), config.max_new_tokens)
    policy.to(world.device).train()  # dropout is off; train mode is what gradient checkpointing asks for
    if config.gradient_checkpointing:
        rollout.recompute_layers(policy)
    reference = None
    if config.selection.strategy != "none" or config.grpo.kl_coef > 0:  # pi_ref: the initial model, frozen
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
    objective = steps.Objective(policy, config, world.size)
    if torch.distributed.is_initialized():
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)
    optimizer = make_optimizer(policy, config)
    start = checkpoint.load(folder, policy, optimizer) if config.resume else 0
    stop = rollout.stop_ids(policy, tokenizer)
    say = tqdm.write if world.is_main else lambda text: None
    say(introduction(folder, policy, tokenizer, stop, problems, config, world))
    if world.is_main:
        checkpoint.begin(folder, keys)
        log = checkpoint.Log(folder, start)

    def run_evaluation(samples: int, title: str):
        return evaluate.evaluate(policy, tokenizer, heldout, world, config, samples=samples, title=title)

    stored = folder / "base_evaluation.npz"
    if not start:
        base = run_evaluation(config.evaluation.samples, "evaluation of the base model")
        if world.is_main:
            base.save(stored)
            log.metrics({"step": 0, **evaluation_metrics(base)})

    for step in tqdm(range(start, config.steps), desc="training", initial=start, total=config.steps, unit="step",
                     disable=not world.is_main):  # fmt: skip
        began = time.perf_counter()

        # 1-3 problems, rollouts, rewards
        sampled, texts, rewarded, correct = steps.roll_out(policy, tokenizer, stop, problems, step, config, world)
        times = {"time/rollout": time.perf_counter() - began, "time/select": 0.0, "time/update": 0.0}

        # 4 advantages: groups are whole on a rank
        advantages = grpo.group_advantages(rewarded, config.group_size, eps=config.grpo.advantage_eps)

        rate = learning_rate(step, steps=config.steps, lr=config.optimizer.lr, schedule=config.optimizer.schedule,
                             warmup=config.optimizer.warmup)  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate

        updates, history = config.grpo.updates_per_rollout, []
        if updates > 1:  # ratios to come are then free of what the sampler's cache and padding round differently
            sampled = steps.rescore(policy, sampled, config, world)
        for part in range(updates):  # each update learns from its own part of the problems; usually there is one
            started = time.perf_counter()
            rows = slice(part * len(texts) // updates, (part + 1) * len(texts) // updates)
            own, on_policy = sampled[rows], part == 0

            # 5 selection, from the record of the policy as it is now
            current = own if on_policy else steps.rescore(policy, own, config, world)
            seed = (config.seed * 1_000_003 + step) * updates + part
            selection = steps.select(current, own.logprobs, advantages[rows], config, seed)
            selected = time.perf_counter()

            # 6 update
            batches = steps.micro_batches(own, advantages[rows], correct[rows], selection, reference, config, world)
            figures = steps.update(objective, optimizer, batches, selection, on_policy=on_policy, world=world,
                                   max_grad_norm=config.optimizer.max_grad_norm)  # fmt: skip
            history.append(figures | steps.selection_metrics(selection.flat, config))
            times["time/select"] += selected - started
            times["time/update"] += time.perf_counter() - selected

        # 7 log, evaluate, save
        metrics = {"step": step + 1}
        metrics |= steps.rollout_metrics(sampled, rewarded, correct, advantages, config.group_size)
        metrics |= mean_of(history) | {"lr": rate, "mem_gb": memory(world), **times}
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
            metrics |= evaluation_metrics(run_evaluation(config.evaluation.samples_between, "evaluation"))
        if world.is_main:
            log.metrics(metrics)
            if (step + 1) % config.log_every == 0 or step == 0:
                say(f"step {step + 1}: reward {metrics['reward/mean']:.3f}, accuracy {metrics['reward/accuracy']:.3f}, "
                    f"entropy {metrics['entropy']:.3f}, KL on selected {metrics['kl/selected']:.4f}, "
                    f"length {metrics['length/mean']:.1f}")
                if metrics["length/frac_truncated"] > 0.5:
                    say(f"  warning: {metrics['length/frac_truncated']:.0%} of the completions are truncated: "
                        f"raise max_new_tokens={config.max_new_tokens}, or see README on stop ids")
                for row in range(0, len(texts), config.group_size)[:2]:  # of two different problems
                    prompt = tokenizer.decode(sampled.prompts[row])
                    log.sample(step + 1, prompt, texts[row], rewarded[row].item())
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            checkpoint.save(folder, step + 1, policy, tokenizer, optimizer)

    trained = run_evaluation(config.evaluation.samples, "evaluation of the trained model")
    if world.is_main:
        with checkpoint.replaced(folder / "model") as unfinished:
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        base = evaluate.Evaluation.load(stored)
        log.metrics({"step": config.steps, **evaluation_metrics(trained, base)})
        table = {"base": base.summary(base), "trained": trained.summary(base)}
        configs.replace_text(folder / "evaluation.json", json.dumps(table, indent=1) + "\n")
        say(f"\n{evaluate.format_table(table)}\n{evaluate.describe(trained, config.evaluation.samples)}")
        say(f"\nwritten to {folder}/: config.yaml, "
            "metrics.jsonl (a line a step), samples.jsonl, evaluation.json, checkpoint/ (for resume=true), model/")


def introduction(folder: Path, policy, tokenizer, stop: list[int], problems: list, config, world) -> str:
    """What the run will do, in numbers, and what the model will see."""
    first_prompt = steps.prompt_ids(tokenizer, problems[:1], config)[0]
    completions = config.prompts_per_step * config.group_size
    return (f"{folder}: {config.prompts_per_step} problems x {config.group_size} = {completions} completions a step, "
            f"{completions // world.size} on each of {world.size} rank(s) of {world.device.type}; "
            f"{config.grpo.updates_per_rollout} update(s) each; "
            f"{config.steps} steps = {config.steps / (len(problems) // config.prompts_per_step):.2f} epochs of "
            f"{len(problems)} problems; {sum(p.numel() for p in policy.parameters()):,} parameters\n"
            f"first prompt: {tokenizer.decode(first_prompt)!r}; stop ids: {dry_run.stops(stop, tokenizer)}")


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the updates of a step that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def evaluation_metrics(evaluation, base=None) -> dict[str, float]:
    return {f"eval/{name}": value for name, (value, _) in evaluation.summary(base).items()}


def memory(world) -> float:
    """Peak memory so far in GB: of the device, or of the process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make_optimizer(policy, config):
    settings = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
    if config.optimizer.zero and torch.distributed.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(policy.parameters(), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(policy.parameters(), **settings)


def check_words(keys: dict) -> None:
    words = {"reward.kind": rewards.REWARDS, "objective": grpo.OBJECTIVES, "selection.strategy": scope.STRATEGIES}
    for key, known in words.items():
        configs.require(keys[key] in known, f"{key.removesuffix('.kind')}={keys[key]}: give one of {', '.join(known)}")


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    check_words(keys)
    folder = None if config.dry_run else checkpoint.run_folder(config, keys)
    problems, heldout, notes = data.problem_sets(config)
    configs.require(len(problems) >= config.prompts_per_step,
                    f"prompts_per_step={config.prompts_per_step}: there are only {len(problems)} problems to train on; "
                    + "; ".join(["lower it or give more", *notes]))  # fmt: skip
    configs.print_notes(notes)
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(dry_run.report(config, keys, problems, heldout))
        return
    world = distributed.setup()
    if config.objective == "kl_cov" and config.grpo.updates_per_rollout == 1:
        configs.print_notes(["objective=kl_cov has no effect with one update per rollout, for its penalty is to the "
                             "policy that sampled; give grpo.updates_per_rollout=2 or more"])  # fmt: skip
    try:
        train(config, keys, folder, problems, heldout, world)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
