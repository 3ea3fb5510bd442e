"""Train a language model with GRPO, and SCOPE's KL penalty on the few tokens that drive entropy collapse.

    python train.py                                      # embedded default: toy model, Countdown; CPU, minutes
    python train.py selection.strategy=none              # plain GRPO
    torchrun --nproc_per_node=4 train.py model=Qwen/Qwen2.5-1.5B gradient_checkpointing=true micro_batch_size=4 ...

One step, with the numbers that README and the comments below use:
  1 problems   2 rollouts   3 rewards   4 advantages   5 selection   6 update   7 log, evaluate, save
"""

import sys

from support import config as configs
from support import help

if __name__ == "__main__":  # before torch is imported: a typo is reported at once
    with configs.one_line_errors():
        help.answer(sys.argv[1:], __doc__, configs.read_defaults())
        KEYS = configs.training_keys(sys.argv[1:])

import json
import math
import os
import time
import zlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import grpo
import rollout
import scope
import step as steps
from rollout import Rollout
from support import card, checkpoint, distributed, memory, models, processes
from support.files import file_name, replace_folder, replace_text


def train(config, keys: dict, folder: Path, problems: list, heldout: dict[str, list], world) -> None:
    """The whole run: base evaluation, the steps, the trained evaluation, and everything under `folder`."""
    run = steps.set_up(config, problems, world)
    for own in heldout.values():
        models.check_lengths(run.policy.config, data.prompt_ids(run.tokenizer, own, config.prompt),
                             config.max_new_tokens)
    start = checkpoint.load(folder, run.policy, run.optimizer) if config.resume else 0
    log = checkpoint.Log(folder, keys, start, active=world.is_main)
    log.print(introduction(folder, run))
    if start == 0:
        base = base_evaluations(run, heldout, folder)
        log.metrics({"step": 0} | evaluation_metrics(base))
    main_file = next(iter(heldout))
    updates = config.grpo.updates_per_rollout

    for step in tqdm(range(start, config.steps), desc="training", initial=start, total=config.steps, unit="step",
                     disable=world.no_bar):
        clock = Stopwatch()

        # 1 problems, of this rank
        asked, rows = steps.draw_problems(run, step)

        # 2 rollouts
        sampled = steps.sample(run, asked, rows, step)

        # 3 rewards
        rewards, correct, texts = steps.reward(run, asked, sampled)
        clock.lap("rollout")

        # 4 advantages: groups are whole on a rank
        advantages = grpo.group_advantages(rewards, config.group_size, eps=config.grpo.advantage_eps)

        if updates > 1:  # ratios to come are then free of what the sampler's cache and padding round differently
            sampled = rollout.rescore(run.policy, sampled, config, world)
        set_rate(run.optimizer, learning_rate(step, config))
        history = []
        for part in range(updates):  # each update learns from its own part of the problems; usually there is one
            own = slice(part * len(rows) // updates, (part + 1) * len(rows) // updates)

            # 5 selection, from the record of the policy as it is now
            current = sampled[own] if part == 0 else rollout.rescore(run.policy, sampled[own], config, world)
            seed = (config.seed * 1_000_003 + step) * updates + part
            selection = steps.select(current, sampled[own].logprobs, advantages[own], config, seed)
            clock.lap("select")

            # 6 update
            batches = steps.micro_batches(sampled[own], advantages[own], correct[own], selection, run.reference,
                                          config, world)
            metrics = steps.update(run.loss, run.optimizer, batches, selection, on_policy=part == 0, world=world,
                                   max_grad_norm=config.optimizer.max_grad_norm)
            history.append(metrics | selection_metrics(selection.flat, config))
            clock.lap("update")

        # 7 log, evaluate, save
        metrics = {"step": step + 1} | rollout_metrics(sampled, rewards, correct, advantages, config.group_size)
        metrics |= mean_of(history) | {"lr": learning_rate(step, config), "mem_gb": distributed.peak_memory(world)}
        metrics |= clock.times
        log.metrics(metrics)
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
            between = evaluated(run, heldout[main_file], config.evaluation.samples_between, "evaluation")
            log.metrics({"step": step + 1} | evaluation_metrics({main_file: between}))
        if (step + 1) % config.log_every == 0 or step == 0:
            print_step(log, metrics, run, sampled, texts, rewards)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            checkpoint.save(folder, step + 1, run.policy, run.tokenizer, run.optimizer)

    trained = {file: evaluated(run, own, config.evaluation.samples, "evaluation of the trained model")
               for file, own in heldout.items()}
    if world.is_main:
        finish(folder, log, run, trained)
    log.close()


# ---------------------------------------------------------------- 6 the learning rate


def learning_rate(step: int, config) -> float:
    """The rate of step 0, 1, .. steps - 1: linear warm-up over a share of the steps, then constant or cosine to 0."""
    lr, rising = config.optimizer.lr, round(config.optimizer.warmup * config.steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    if config.optimizer.schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (config.steps - rising)))


def set_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---------------------------------------------------------------- 7 metrics and logs


class Stopwatch:
    """Seconds by what they were spent on, as the metrics time/NAME."""

    def __init__(self):
        self.last, self.times = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + now - self.last
        self.last = now


def rollout_metrics(sampled: Rollout, rewards: Tensor, correct: Tensor, advantages: Tensor, group_size: int) -> dict:
    """Metrics of the step's rollouts, over all ranks; groups are whole on a rank."""
    columns = [rewards, correct.float(), advantages, sampled.lengths.float(), sampled.stopped.float()]
    rewards, correct, advantages, lengths, stopped = distributed.gather(torch.stack(columns, dim=1)).unbind(dim=1)
    entropy = distributed.gather(sampled.entropy[sampled.mask])
    groups = rewards.view(-1, group_size)
    metrics = {
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
    return {name: float(value) for name, value in metrics.items()}


def selection_metrics(flat: dict[str, Tensor], config) -> dict[str, float]:
    """Which tokens were taken, over all ranks."""
    selected = flat["selected"]
    scores = scope.redistribution_score(flat["logprobs"].exp(), flat["advantages"])
    metrics = {
        "selection/fraction": selected.float().mean(),
        "selection/candidates": (scores > 0).float().mean(),
        "objective/fraction": flat["marked"].float().mean(),
    }
    if scope.STRATEGIES[config.selection.strategy].share is None:
        metrics["selection/shortfall"] = round(config.selection.fraction * len(selected)) - selected.sum()
    if "branching" in flat:
        metrics["selection/branching"] = flat["branching"].mean()  # tokens where a sibling goes another way
    if selected.any():
        metrics |= {
            "selection/p": flat["logprobs"][selected].exp().mean(),
            "selection/advantage": flat["advantages"][selected].mean(),
            "selection/negative": (flat["advantages"][selected] < 0).float().mean(),
            "selection/entropy": flat["entropy"][selected].mean(),
        }
    return {name: float(value) for name, value in metrics.items()}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates of a step that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def evaluated(run, heldout: list, samples: int, title: str) -> evaluate.Evaluation:
    return evaluate.evaluate(run.policy, run.tokenizer, heldout, run.world, run.config, samples=samples, title=title)


def base_evaluations(run, heldout: dict[str, list], folder: Path) -> dict[str, evaluate.Evaluation]:
    """Of the model before training, by file, also put into the run's folder.

    They are drawn once for all runs of the same weights, problems and settings of sampling: runs/base-evaluations/.
    """
    config, found = run.config, {}
    settings = {"weights": models.digest(run.policy), "device": run.world.device.type,
                "precision": run.world.precision, "grader": config.reward.grader, "samples": config.evaluation.samples,
                "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
                "seed": config.evaluation.seed}
    for file, problems in heldout.items():
        asked = [problems, data.prompt_ids(run.tokenizer, problems, config.prompt), run.stop]
        label = zlib.crc32(json.dumps([settings, asked]).encode())
        stored = Path("runs") / "base-evaluations" / f"{label:08x}.npz"
        own = folder / "base_evaluation" / f"{file_name(file)}.npz"
        if not distributed.from_main(run.world.is_main and stored.is_file()):
            found[file] = evaluated(run, problems, config.evaluation.samples, "evaluation of the base model")
            if run.world.is_main:
                found[file].save(stored)
        if run.world.is_main:
            found[file] = evaluate.Evaluation.load(stored)
            found[file].save(own)
    return found


def evaluation_metrics(trained: dict, base: dict | None = None) -> dict[str, float]:
    """The first file's as eval/NAME, those of further files as eval/FILE/NAME; of Pass@k its standard error too."""
    metrics = {}
    for i, (file, evaluation) in enumerate(trained.items()):
        prefix = f"eval/{file_name(file)}/" if i else "eval/"
        summary = evaluation.summary(base and base[file])
        metrics |= {prefix + name: value for name, (value, _) in summary.items()}
        metrics |= {f"{prefix}{name}_stderr": error for name, (_, error) in summary.items()
                    if name.startswith("pass@") and error is not None}
    return metrics


def introduction(folder: Path, run) -> str:
    """What the run will do, in numbers, and what the model will see."""
    config, ranks = run.config, run.world.size
    first_prompt = data.prompt_ids(run.tokenizer, run.problems[:1], config.prompt)[0]
    completions = config.prompts_per_step * config.group_size
    return (f"{folder}: {config.prompts_per_step} problems x {config.group_size} = {completions} completions a step, "
            f"{completions // ranks} on each of {ranks} rank(s) of {run.world.device.type}; "
            f"{config.grpo.updates_per_rollout} update(s) each; "
            f"{config.steps} steps = {config.steps / (len(run.problems) // config.prompts_per_step):.2f} epochs of "
            f"{len(run.problems)} problems; {sum(p.numel() for p in run.policy.parameters()):,} parameters\n"
            f"first prompt: {run.tokenizer.decode(first_prompt)!r}; "
            f"stop ids: {models.describe(run.stop, run.tokenizer)}")


def print_step(log, metrics: dict, run, sampled: Rollout, texts: list[str], rewards: Tensor) -> None:
    """A line of metrics, and a completion of each of two problems."""
    selected = f"KL on selected {metrics['kl/selected']:.4f}, " * (metrics["selection/fraction"] > 0)
    log.print(f"step {metrics['step']}: reward {metrics['reward/mean']:.3f}, "
              f"accuracy {metrics['reward/accuracy']:.3f}, entropy {metrics['entropy']:.3f}, "
              f"{selected}length {metrics['length/mean']:.1f}")
    if metrics["length/frac_truncated"] > 0.5:
        log.print(f"  warning: {metrics['length/frac_truncated']:.0%} of the completions are truncated: raise "
                  f"max_new_tokens={run.config.max_new_tokens}, or see docs/questions.md on stop ids")
    for row in range(0, len(texts), run.config.group_size)[:2]:
        log.sample(metrics["step"], run.tokenizer.decode(sampled.prompts[row]), texts[row], rewards[row].item())


def finish(folder: Path, log, run, trained: dict[str, evaluate.Evaluation]) -> None:
    """The model as an HF folder, and the table of base against trained for each file."""
    base = {file: evaluate.Evaluation.load(folder / "base_evaluation" / f"{file_name(file)}.npz") for file in trained}
    log.metrics({"step": run.config.steps} | evaluation_metrics(trained, base))
    report, tables, every_k = {}, {}, [2**i for i in range(20)]
    for file, own in trained.items():
        both = {"base": base[file].summary(base[file]), "trained": own.summary(base[file])}
        tables[file] = evaluate.format_table(both)
        described = evaluate.describe(own, run.config.evaluation.samples, run.config.temperature)
        log.print(f"\n{file}:\n{tables[file]}\n{described}")
        report[file] = {"base": base[file].summary(base[file], every_k), "trained": own.summary(base[file], every_k)}
    with replace_folder(folder / "model") as unfinished:
        run.policy.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card.model_card(log.keys, tables, described))
    replace_text(folder / "evaluation.json", json.dumps(report, indent=1) + "\n")
    log.print(f"\nwritten to {folder}/: config.yaml, metrics.jsonl (a line a step), samples.jsonl, evaluation.json, "
              "checkpoint/ (for resume=true), model/")


# ---------------------------------------------------------------- the command


def foreseen(config, problems: list, heldout: dict[str, list], ranks: int):
    """Before any weight is loaded: the run with a blank policy, every prompt, and what memory a config would need."""
    run = steps.set_up(config, problems, distributed.World(0, ranks, torch.device("meta")), weights=False)
    asked = run.problems + [problem for own in heldout.values() for problem in own]
    prompts = data.prompt_ids(run.tokenizer, asked, config.prompt)
    models.check_lengths(run.policy.config, prompts, config.max_new_tokens)
    strategy = scope.STRATEGIES[config.selection.strategy]
    needed = partial(
        memory.estimate, run.policy.config, sum(p.numel() for p in run.policy.parameters()), ranks=ranks,
        precision="fp32" if config.precision == "fp32" else "bf16", prompt=max(map(len, prompts)),
        reference=strategy.selects or config.grpo.kl_coef > 0,
        all_selected=strategy.share == 1 or config.grpo.kl_coef > 0)
    return run, prompts, needed


def dry_run(config, keys: dict, problems: list, heldout: dict[str, list]) -> None:
    """Prints what the run would be."""
    ranks, defaults = int(os.environ.get("WORLD_SIZE", "1")), configs.read_defaults()
    run, prompts, needed = foreseen(config, problems, heldout, ranks)
    print(memory.report(
        run.policy, run.tokenizer, changed={key: value for key, value in keys.items() if value != defaults[key]},
        prompts=prompts, problems=len(run.problems), heldout=sum(map(len, heldout.values())), config=config,
        ranks=ranks, stop_ids=models.describe(run.stop, run.tokenizer), needed=needed))


def main(keys: dict) -> None:
    config = configs.namespace(configs.nest(keys))
    steps.check_methods(config)
    folder = None if config.dry_run else checkpoint.run_folder(config, keys)
    if folder and config.resume and checkpoint.is_finished(folder, config.steps):
        configs.print_notes([f"{folder} is finished: {config.steps} steps; evaluation.json has its table"])
        return
    problems, heldout, notes = data.problem_sets(config)
    configs.require(len(problems) >= config.prompts_per_step,
                    f"prompts_per_step={config.prompts_per_step}: there are only {len(problems)} problems to train on; "
                    + "; ".join(["lower it or give more", *notes]))
    if grpo.OBJECTIVES[config.objective].off_policy and config.grpo.updates_per_rollout == 1:
        notes.append(f"objective={config.objective} has no effect with one update per rollout, for its penalty is to "
                     "the policy that sampled; give grpo.updates_per_rollout=2 or more")
    configs.print_notes(notes)
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            dry_run(config, keys, problems, heldout)
        return
    rank = int(os.environ.get("RANK", "0"))
    with processes.only_one(folder / "lock", rank), distributed.joined(config.precision) as world:
        if config.fit_batches and world.device.type == "cuda":
            _, _, needed = foreseen(config, problems, heldout, world.size)
            words = memory.fit(0.9 * torch.cuda.mem_get_info()[0], config, needed)
            configs.print_notes([f"fit_batches: {words}"])
        train(config, keys, folder, problems, heldout, world)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(KEYS)
