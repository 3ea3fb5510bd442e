"""Explain one real training step number by number, for those who teach or learn the method.

    python -m paper.one_step                        # writes docs/one-step.md
    python -m paper.one_step step=0 out=first.md    # the first step, at which the KL is 0

The page follows one step of train.py's default run. It shows a problem, its completions with their
rewards and advantages, the tokens of one completion with their scores, which tokens are selected,
and the loss. The steps before it are run first and are not saved.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import data
import scope
from evaluate import markdown_table
from grpo import group_advantages
from rewards import REWARDS, grade
from rollout import Rollout, decode, sample, sampling_settings
from support.config import load_config, one_line_errors, require, show_help
from support.distributed import start
from support.files import replace_text
from support.models import hidden_states, on_device
from train import Run, draw_problems, learning_rate, select, set_learning_rate, set_up, update

SETTINGS = {"step": 20, "out": "docs/one-step.md"}


def draw_step(run: Run, step: int) -> tuple[list[dict], Rollout]:
    """Do parts 1 to 5 of a training step as train.py does them, without an update.

    Returns the problem of each of the B completions, and the rollout with its selected tokens.
    """
    config = run.config
    require(
        step >= 0 and config.updates_per_rollout == 1,
        "this command needs a step of at least 0 and updates_per_rollout=1",
    )
    problems, rows = draw_problems(run.problems, step, config, run.world)
    prompts = data.prompt_ids(run.tokenizer, problems, config.prompt)
    settings = sampling_settings(config)
    with run.world.autocast():
        rollout = sample(
            run.policy, prompts, rows, stop=run.stop, seed=config.seed, step=step, **settings
        )
    rollout.correct, _ = grade(run.tokenizer, problems, rollout, config.grader)
    rollout.rewards = REWARDS[config.reward].function(rollout)
    rollout.advantages = group_advantages(rollout.rewards, config.group_size)
    seed = config.seed * 1_000_003 + step
    rollout.selected, rollout.token_mask, _ = select(rollout, rollout, config, run.world, seed)
    return problems, rollout


def train_step(run: Run, step: int, rollout: Rollout) -> dict[str, float]:
    """Do part 6, the update, and return its metrics."""
    set_learning_rate(run.optimizer, learning_rate(step, run.config))
    return update(run, rollout, on_policy=True)


def token_scores(rollout: Rollout) -> Tensor:
    """Return the score of every token, 0 at padding.  [B, C]  Eq. 11"""
    scores = scope.redistribution_score(rollout.logprobs.exp(), rollout.advantages[:, None])
    return scores * rollout.mask


@torch.no_grad()
def token_kl(run: Run, rollout: Rollout, row: int) -> Tensor:
    """Return KL(policy || reference) at each of the T tokens of one completion.  [T]  Eq. 14"""
    tokens, predicts_completion = rollout.pad([row])
    logits = []
    with on_device(run.reference, run.world.device), run.world.autocast():
        for model in (run.policy, run.reference):
            hidden = hidden_states(model, tokens)[predicts_completion]
            logits.append(model.get_output_embeddings()(hidden))
    return scope.kl_divergence(*logits, temperature=run.config.temperature)


def completion_table(run: Run, rollout: Rollout, rows: range) -> str:
    """Write a table with the text, the reward and the advantage of some completions."""
    texts = decode(run.tokenizer, rollout)
    lines = []
    for number, row in enumerate(rows, start=1):
        reward = f"{rollout.rewards[row]:g}"
        lines.append([str(number), f"`{texts[row]}`", reward, f"{rollout.advantages[row]:+.4f}"])
    return markdown_table(["", "completion", "reward r", "advantage A"], lines)


def token_table(run: Run, rollout: Rollout, row: int) -> str:
    """Write a table with the numbers of every token of one completion."""
    scores = token_scores(rollout)[row]
    lines = []
    for t, kl in enumerate(token_kl(run, rollout, row)):
        text = run.tokenizer.decode([int(rollout.tokens[row, t])]).strip()
        numbers = [rollout.logprobs[row, t].exp(), rollout.entropy[row, t], scores[t]]
        paid = f"{kl:.5f}" if rollout.selected[row, t] else ""
        lines.append([f"`{text}`", *(f"{number:.4f}" for number in numbers), paid])
    return markdown_table(["token", "p", "entropy", "score", "KL, if selected"], lines)


def write_page(run: Run, step: int) -> str:
    """Do one training step, the update included, and write the page about it."""
    config = run.config
    _, rollout = draw_step(run, step)
    num_selected = int(rollout.selected.sum())
    require(num_selected > 0, "no token of this step is selected: give another step=")
    # Show the completion with the most selected tokens.
    row = int(rollout.selected.sum(dim=1).argmax())
    first = row - row % config.group_size
    completions = completion_table(run, rollout, range(first, first + config.group_size))
    tokens = token_table(run, rollout, row)
    fraction = config.selection.fraction
    num_tokens = int(rollout.mask.sum())
    threshold = token_scores(rollout)[rollout.selected].min()
    policy_loss = -(rollout.advantages * rollout.lengths).sum() / num_tokens
    metrics = train_step(run, step, rollout)
    kl = metrics["kl/selected"]
    return f"""# One training step, number by number

`python -m paper.one_step step={step}` wrote this page. It shows step {step} of a training run of
the model `{config.model}`, with seed {config.seed}. Steps are counted from 0, so the model has had
{step} updates before. The names in brackets are the functions that compute the numbers.

## 1. The problem

The model reads this prompt (`data.prompt_ids`):

    {run.tokenizer.decode(rollout.prompts[row])}

In Countdown the numbers on the left have to be combined, each exactly once, so that the last result
is the number after the arrow.

## 2. Completions, 3. rewards, 4. advantages

The model writes {config.group_size} completions of the same prompt, which are called a *group*
(`rollout.sample`). The reward r of a completion is 1 if it solves the problem, and otherwise 0
(`rewards.grade`). The advantage A says how much better a completion is than the rest of its group
(`grpo.group_advantages`):

    A = (r - mean of the group) / (standard deviation of the group + 0.0001)

If all completions of a group have the same reward, every A is 0 and the group teaches nothing.

{completions}
## 5. Scores, and the selected tokens

Here are the tokens of completion {row - first + 1}. They all share the advantage of their
completion, A = {rollout.advantages[row]:+.4f}.

{tokens}
- **p** is the probability that the model gave to this token when it wrote it.
- **entropy** is -sum p_v log p_v over all tokens v that could have been written here. It is 0 if
  the model was certain, and large if many tokens were likely.
- **score** is p (1 - p) max(A, 0) (`scope.redistribution_score`). It is large where the model was
  in doubt and was then rewarded. There an update changes the probabilities most.
- **KL** is sum p_v log(p_v / q_v), where q_v are the probabilities of the model before training
  (`scope.kl_divergence`). It says how far training has moved the model at this token. Only the
  selected tokens pay for it, so the others show none.

All completions of the step together have {num_tokens} tokens. SCOPE may select
{100 * fraction:g} % of them, which is {round(fraction * num_tokens)}. It takes those
with the highest scores (`scope.select_tokens`): {num_selected} are selected, and the lowest score
among them is {threshold:.4f}.

## 6. The loss and the update

The loss has two parts (`train.MicroBatchLoss`):

- **The policy loss** is the mean of -A p / p_old over all tokens (`grpo.policy_loss`), where p_old
  is the probability at the time of writing. Nothing has been updated since, so p / p_old = 1 and
  the value is just the mean of -A, {policy_loss:.6f}. Its gradient is what matters: it makes tokens
  with A > 0 more likely, and tokens with A < 0 less likely.
- **The penalty** is λ times the mean KL of the selected tokens. Here λ is
  {config.selection.kl_coef:g} and the mean KL is {kl:.6f}.

The sum is what the update lowers:

    loss = {policy_loss:.6f} + {config.selection.kl_coef:g} x {kl:.6f} = {metrics["loss"]:.6f}

The gradient of the loss has the norm {metrics["grad_norm"]:.4f}. If that is more than
{config.optimizer.max_grad_norm:g}, the gradient is scaled down to it. One step of the optimizer
AdamW ends the training step (`train.update`).
"""


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    config = load_config(arguments, SETTINGS)
    require(
        (config.objective, config.selection.strategy, config.reward)
        == ("grpo", "scope", "accuracy"),
        "the page explains objective=grpo with selection.strategy=scope and reward=accuracy",
    )
    with start(config.precision) as world:
        run = set_up(config, world, Path("runs"))
        for step in range(config.step):
            _, rollout = draw_step(run, step)
            train_step(run, step, rollout)
        replace_text(Path(config.out), write_page(run, config.step))
    print(f"written: {config.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
