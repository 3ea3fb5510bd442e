"""Measure how tight SCOPE's score is: |R| / L of Proposition 1 on real rollouts (Appendix A.23).

    python -m paper.tightness                                              # the untrained toy model
    python -m paper.tightness recipe=runs/a/config.yaml model=runs/a/model    # after a training run

A context is a prompt and the beginning of a completion. At contexts from one training step the
likely next tokens are forced, one after the other, and each is continued many times. The success
rates of the continuations give alpha_v = E[|A| given v], and scope.decompose gives L (what the
score keeps) and R (what it drops). The table is printed and written to analyses/tightness.md.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import scope
from evaluate import Estimate, difference, forking_threshold, markdown_table
from grpo import group_advantages
from paper.one_step import draw_step
from rewards import is_correct
from rollout import Rollout, sample, sampling_settings
from support.config import load_config, one_line_errors, require, show_help
from support.distributed import start
from support.files import replace_text
from support.models import hidden_states
from train import Run, set_up

SETTINGS = {
    "step": 0,
    "contexts": 150,  # of each kind
    "continuations": 64,  # of each forced token
    "out": "analyses/tightness.md",
}
FORCED = 8  # number of likely tokens that are forced at each context
FIRST_STEP = -2  # each context has its own random numbers, of step -2, -3, ...

# ---------------------------------------------------------------- the estimate


def expected_advantage(success_rate: float, group_size: int) -> np.ndarray:
    """Return E|A| of a failure and of a success if each group mate succeeds at this rate.  [2]"""
    mates = group_size - 1
    expected = np.zeros(2)
    for c in range(group_size):
        chance = math.comb(mates, c) * success_rate**c * (1 - success_rate) ** (mates - c)
        for reward in (0, 1):
            group = torch.tensor([reward] + [1] * c + [0] * (mates - c), dtype=torch.float64)
            expected[reward] += chance * group_advantages(group, group_size)[0].abs()
    return expected


def decompose_context(
    p: np.ndarray, successes: np.ndarray, levels: np.ndarray, rng
) -> tuple[float, float, float, float]:
    """Estimate |R| and L of the first of k forced tokens, and their means under the null.

    p [k] sums to 1; successes bool [k, M] of the continuations; levels [2]: E|A| of a failure and
    of a success. Given its reward a completion's |A| does not depend on v, so alpha_v is linear in
    the success rate of v. The null is the hypothesis that every token has the success rate of
    the context, so that R is nothing but the noise of M continuations.
    """
    rates = successes.mean(axis=1)
    count = successes.shape[1]
    null = rng.binomial(count, min(1.0, p @ rates), size=(100, len(p))) / count
    alpha = torch.from_numpy(levels[0] + (levels[1] - levels[0]) * np.vstack([rates, null]))
    _, L, R = scope.decompose(torch.from_numpy(p).expand_as(alpha), alpha)
    L = L[:, 0].numpy()
    R = R[:, 0].abs().numpy()
    return R[0], L[0], R[1:].mean(), L[1:].mean()


def tightness_ratio(
    contexts: np.ndarray, problems: np.ndarray
) -> tuple[float, float, float, float]:
    """Return sum |R| / sum L, the ends of its 95 % interval, and its null value.

    contexts [n, 4] are results of decompose_context, and problems [n] say where each is from. The
    interval is from a bootstrap over problems.
    """
    sums = np.array([contexts[problems == p].sum(axis=0) for p in np.unique(problems)])
    zero = Estimate(np.zeros(len(sums)), np.ones(len(sums)))
    ratio, low, high = difference(zero, Estimate(sums[:, 0], sums[:, 1]))
    _, _, null_R, null_L = sums.sum(axis=0)
    return ratio, low, high, null_R / null_L


# ---------------------------------------------------------------- forcing and following tokens


@torch.no_grad()
def next_token_probs(run: Run, rollout: Rollout, row: int, t: int) -> Tensor:
    """Return the probabilities of all tokens at position t of a completion, on the CPU.  [V]"""
    tokens, predicts_completion = rollout.pad([row])
    with run.world.autocast():
        hidden = hidden_states(run.policy, tokens)[predicts_completion]
        logits = run.policy.get_output_embeddings()(hidden[t])
    return torch.softmax(logits.float() / run.config.temperature, dim=-1).cpu()


def likely_tokens(probs: Tensor, token: int) -> list[int]:
    """Return the FORCED likeliest tokens, with the sampled token in front.  [V] -> k ids"""
    likeliest = probs.topk(FORCED).indices.tolist()
    return [token, *(v for v in likeliest if v != token)]


def follow(
    run: Run, problem: dict, prompt: list[int], beginnings: list[list[int]], step: int
) -> np.ndarray:
    """Continue each of k beginnings of a completion M = continuations times, and grade the results.

    As in training, the first stop token ends a completion, and one without a stop token within
    max_new_tokens is wrong.  -> bool [k, M]
    """
    config = run.config
    repeated = [ids for ids in beginnings for _ in range(config.continuations)]
    prompts = [prompt + ids for ids in repeated]
    rows = list(range(len(prompts)))
    settings = sampling_settings(config)
    with run.world.autocast():
        rollout = sample(
            run.policy, prompts, rows, stop=run.stop, seed=config.seed, step=step, **settings
        )
    correct = []
    for beginning, continuation in zip(repeated, rollout.tokens.tolist()):
        ids = [*beginning, *continuation][: config.max_new_tokens]
        ends = [i for i, token in enumerate(ids) if token in run.stop]
        solved = False
        if ends:
            text = run.tokenizer.decode(ids[: ends[0] + 1], skip_special_tokens=True)
            solved = is_correct(problem, text, config.grader)
        correct.append(solved)
    return np.array(correct).reshape(len(beginnings), config.continuations)


def measure_context(
    run: Run, problem: dict, rollout: Rollout, row: int, t: int, rng, step: int
) -> tuple[float, float, float, float]:
    """Force the likely tokens at position t of a completion and decompose the context there."""
    probs = next_token_probs(run, rollout, row, t)
    tokens = likely_tokens(probs, int(rollout.tokens[row, t]))
    before = rollout.tokens[row, :t].tolist()
    # The last beginning is empty: the success rate of the group must come from new completions,
    # because the step's own were used to choose the positions.
    beginnings = [[*before, v] for v in tokens] + [[]]
    successes = follow(run, problem, rollout.prompts[row], beginnings, step)
    levels = expected_advantage(successes[-1].mean(), run.config.group_size)
    p = probs[tokens].double().numpy()
    return decompose_context(p / p.sum(), successes[:-1], levels, rng)


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    config = load_config(arguments, SETTINGS)
    rng = np.random.default_rng(config.seed)
    lines = []
    with start(config.precision) as world:
        run = set_up(config, world, Path("runs"))
        problems, rollout = draw_step(run, config.step)
        threshold = forking_threshold(rollout.entropy[rollout.mask].cpu(), config.forking_fraction)
        masks = {"selected": rollout.selected, "forking": rollout.entropy > threshold}
        for kind, mask in masks.items():
            positions = rng.permutation(mask.nonzero().cpu())[: config.contexts]
            require(len(positions) > 0, f"no token of the step is {kind}: give another step=")
            contexts = []
            for i, (row, t) in enumerate(tqdm(positions.tolist(), kind, disable=world.hide_bar)):
                step = FIRST_STEP - i
                contexts.append(measure_context(run, problems[row], rollout, row, t, rng, step))
            groups = positions[:, 0] // config.group_size
            ratio, low, high, null = tightness_ratio(np.array(contexts), groups)
            interval = f"{low:.3f} to {high:.3f}"
            lines.append([kind, str(len(groups)), f"{ratio:.3f}", interval, f"{null:.3f}"])
    text = markdown_table(
        ["tokens", "contexts", "sum of abs(R) / sum of L", "95 % interval", "noise alone"], lines
    )
    replace_text(Path(config.out), text)
    print(f"{text}\nwritten: {config.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
