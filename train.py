"""Train a language model with GRPO, and SCOPE's KL penalty on the few tokens that drive entropy collapse.

    python train.py                                      # embedded default: toy model, Countdown; CPU, minutes
    python train.py selection.strategy=none              # plain GRPO
    torchrun --nproc_per_node=4 train.py model=Qwen/Qwen2.5-1.5B gradient_checkpointing=true micro_batch_size=4 ...

One step, with the numbers that README and the comments below use:
  1 problems   2 rollouts   3 rewards   4 advantages   5 selection   6 update   7 log, save, evaluate
"""

import json
import math
import os
import sys
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
from metrics import Stopwatch, is_finite, mean_of, rollout_metrics, selection_metrics
from rollout import Rollout
from support import card, checkpoint, distributed, help, memory, models, processes, runs, signals, watch
from support import config as configs
from support.checks import Halted
from support.files import file_name, json_sum, replace_folder, replace_text


def train(config, keys: dict, folder: Path, problems: list, heldout: dict[str, list], world) -> None:
    """The whole run: base evaluation, the steps, the trained evaluation, and everything under `folder`."""
    run = steps.set_up(config, problems, world)
    prompts = [data.prompt_ids(run.tokenizer, own, config.prompt) for own in heldout.values()]
    models.check_lengths(run.policy.config, sum(prompts, []), config.max_new_tokens)
    run.inputs = {"model": models.digest(run.policy), "the training problems": json_sum(run.problems),
                  "evaluation.data": json_sum(heldout), "the tokenizer": json_sum([prompts, run.stop]),
                  "precision": world.precision}
    saved = checkpoint.newest(folder, run) if distributed.from_main(world.is_main and config.resume) else None
    start = checkpoint.step_of(saved) if saved else 0
    log = runs.Log(folder, keys, start, active=world.is_main)
    log.print(introduction(folder, run))
    signals.way_on = f"{'python' if world.size == 1 else 'torchrun ...'} train.py name={folder.name} resume=true"
    base = base_evaluations(run, heldout, folder, resumed=start > 0)  # as long as the policy is the base model
    if saved:
        checkpoint.load(saved, run)
        if evaluation_due(start, config) and distributed.from_main(world.is_main and not log.has_evaluation(start)):
            evaluate_between(run, heldout, start, log)  # it was stopped in that one
    else:
        log.metrics({"step": 0} | evaluation_metrics(base))
    updates, bad_steps = config.grpo.updates_per_rollout, 0

    for step in tqdm(range(start, config.steps), desc="training", initial=start, total=config.steps, unit="step",
                     disable=world.no_bar):
        clock = Stopwatch()
        signals.finish(f"step {step + 1}")
        watch.phase(f"the rollouts of step {step + 1}")

        # 1 problems, of this rank
        asked, rows = steps.draw_problems(run, step)

        # 2 rollouts
        sampled = steps.sample(run, asked, rows, step)

        # 3 rewards
        rewards, correct, texts = steps.reward(run, asked, sampled)
        clock.lap("rollout")

        # 4 advantages: groups are whole on a rank
        advantages = grpo.group_advantages(rewards, config.group_size)

        watch.phase(f"the update of step {step + 1}")
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
            batches = steps.MicroBatches(sampled[own], advantages[own], correct[own], selection, run.reference,
                                          config, world)
            metrics = steps.update(run.loss, run.optimizer, batches, selection, on_policy=part == 0, world=world,
                                   max_grad_norm=config.optimizer.max_grad_norm)
            history.append(metrics | selection_metrics(selection.flat, config))
            clock.lap("update")

        # 7 log, save, evaluate
        metrics = {"step": step + 1} | rollout_metrics(sampled, rewards, correct, advantages, config.group_size)
        metrics |= mean_of(history) | {"lr": learning_rate(step, config), "mem_gb": distributed.peak_memory(world)}
        metrics |= clock.times
        log.metrics(metrics)
        if (step + 1) % config.log_every == 0 or step == 0:
            print_step(log, metrics, run, sampled, texts, rewards)
        bad_steps = bad_steps + 1 if metrics["update/skipped"] == 1 else 0
        save_or_stop(folder, step + 1, run, log, bad_steps, (sampled, texts, rewards))
        if evaluation_due(step + 1, config):
            evaluate_between(run, heldout, step + 1, log)

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


# ---------------------------------------------------------------- 7 evaluations and logs


def save_or_stop(folder: Path, step: int, run, log, bad_steps: int, drawn: tuple) -> None:
    """A save where one is due, before an evaluation too. A signal, or numbers that are not finite, end the run here:
    such weights never take the place of finite ones."""
    config = run.config
    if bad_steps == config.max_bad_steps:
        give_up(folder, step, run, drawn, f"{bad_steps} steps in a row had no finite loss and gradient")
    watch.phase(f"the save after step {step}", patient=True)
    stop, last = distributed.highest(signals.asked), step == config.steps
    if stop or last or step % config.save_every == 0 or evaluation_due(step, config):
        if is_finite(run, drawn[0]):
            checkpoint.save(folder, step, run)
        elif last or stop:
            give_up(folder, step, run, drawn, "the weights give no finite gradient")
        else:
            log.print(f"warning: step {step} is not saved, for the weights give no finite gradient")
        stop = distributed.highest(signals.asked)
    if stop:
        log.close()
        signals.leave(stop, f"step {step} is finished and saved")
    if last or evaluation_due(step, config):
        signals.finish("")  # an evaluation can be stopped at once; else a signal is the next step's


def give_up(folder: Path, step: int, run, drawn: tuple, reason: str) -> None:
    """The end of a run whose numbers are not finite, with the step's rollouts written for a look."""
    file = folder / f"bad-step-{step}-rank{run.world.rank}.jsonl"
    runs.write_rollouts(file, run.tokenizer, *drawn)
    distributed.barrier()
    raise Halted(f"step {step}: {reason}; {file} has the completions; a save, if there is one, holds finite weights; "
                 f"lower optimizer.lr={run.config.optimizer.lr}, or look for what is not finite")


def evaluated(run, heldout: list, samples: int, title: str) -> evaluate.Evaluation:
    watch.phase(f"the {title}", patient=True)
    return evaluate.evaluate(run.policy, run.tokenizer, heldout, run.world, run.config, samples=samples, title=title)


def evaluation_due(steps_done: int, config) -> bool:
    """Whether an evaluation in between follows; it can be stopped at once, for what is evaluated was saved before."""
    return config.evaluation.every > 0 and steps_done % config.evaluation.every == 0 and 0 < steps_done < config.steps


def evaluate_between(run, heldout: dict[str, list], steps_done: int, log) -> None:
    main_file = next(iter(heldout))
    between = evaluated(run, heldout[main_file], run.config.evaluation.samples_between, "evaluation")
    log.metrics({"step": steps_done} | evaluation_metrics({main_file: between}))


def base_evaluations(run, heldout: dict[str, list], folder: Path, *, resumed: bool) -> dict[str, evaluate.Evaluation]:
    """Of the model before training, by file, also put into the run's folder; a resumed run has them there.

    They are drawn once for all runs of the same weights, problems and settings of sampling: runs/base-evaluations/.
    """
    config, main, found = run.config, run.world.is_main, {}
    settings = {"weights": run.inputs["model"], "device": run.world.device.type,
                "precision": run.world.precision, "grader": config.reward.grader, "samples": config.evaluation.samples,
                "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
                "seed": config.evaluation.seed}
    for file, problems in heldout.items():
        asked = [problems, data.prompt_ids(run.tokenizer, problems, config.prompt), run.stop]
        own = folder / "base_evaluation" / f"{file_name(file)}.npz"
        stored = own if resumed else Path("runs") / "base-evaluations" / f"{json_sum([settings, asked])}.npz"
        if not distributed.from_main(main and is_whole(stored)):
            found[file] = evaluated(run, problems, config.evaluation.samples, "evaluation of the base model")
            if main:
                found[file].save(stored)
        if main:
            found[file] = evaluate.Evaluation.load(stored)
            found[file].save(own)
    return found


def is_whole(stored: Path) -> bool:
    try:
        return bool(evaluate.Evaluation.load(stored))
    except FileNotFoundError:
        return False
    except Exception:  # whatever numpy makes of a damaged file
        configs.print_notes([f"{stored} is damaged: made again"])
        return False


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
    if metrics["group/frac_zero_std"] == 1:
        log.print("  no group's rewards differ: this step teaches nothing")
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
        described = evaluate.describe(*own.correct.shape, run.config.evaluation.samples, run.config.temperature)
        log.print(f"\n{file}:\n{tables[file]}\n{described}")
        report[file] = {"base": base[file].summary(base[file], every_k), "trained": own.summary(base[file], every_k)}
    with replace_folder(folder / "model") as unfinished:
        run.policy.save_pretrained(unfinished)
        run.tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card.model_card(log.keys, tables, described))
    replace_text(folder / "evaluation.json", json.dumps(report, indent=1) + "\n")
    log.print(f"\nwritten to {folder}/: config.yaml, metrics.jsonl (a line a step), samples.jsonl, evaluation.json, "
              "checkpoints/ (for resume=true), model/")


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
        reference=strategy.selects, all_selected=strategy.share == 1)
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
    folder = None if config.dry_run else runs.run_folder(config, keys)
    if folder and config.resume and runs.is_finished(folder, config.steps):
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
    with processes.only_one(folder / "lock", rank), distributed.joined(
            config.precision, config.distributed_timeout) as world, watch.watching(
            folder / "ranks", world.rank, world.size, 60 * config.distributed_timeout, distributed.barrier):
        if config.fit_batches and world.device.type == "cuda":
            _, _, needed = foreseen(config, problems, heldout, world.size)
            words = memory.fit(0.9 * torch.cuda.mem_get_info()[0], config, needed)
            configs.print_notes([f"fit_batches: {words}"])
        train(config, keys, folder, problems, heldout, world)


if __name__ == "__main__":
    with configs.one_line_errors():
        help.answer(sys.argv[1:], __doc__)
        main(configs.training_keys(sys.argv[1:]))
