"""How tight is SCOPE's score? |R|/L of Proposition 1 on real rollouts, which the paper leaves open (A.23).

    python -m analysis.tightness model=runs/a/model

A table goes to the terminal and to out=analyses/. `run=` takes a run's model and settings; one process, any device.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import grpo
import rollout
import scope
from analysis.one_step import Step, analysis_keys, draw_step, keys_of_an_analysis, settings_of
from support import config as configs
from support import distributed, help
from support.files import replace_text
from support.models import hidden_states
from support.tables import markdown_table

KEYS = {
    "contexts": 150,  # of each kind
    "continuations": 64,  # of each forced token (M)
    "others": 64,  # further rollouts of a problem, for its success rate
    "cover": 0.99,  # tokens are forced until they hold this share of the probability ...
    "most": 8,  # ... or are this many
}
KINDS = ("selected", "positive, unselected", "forking")
OTHERS, FORCED = -2, -3  # the `step` of draws that are none of training's, nor evaluation's


def advantage_table(group_size: int, *, eps: float) -> np.ndarray:
    """|A| of a completion with reward r (rows 0, 1) when c = 0 .. G - 1 of its group's others succeed.  -> [2, G]"""
    table = np.zeros((2, group_size))
    for r in (0, 1):
        for c in range(group_size):
            group = torch.tensor([r] + [1] * c + [0] * (group_size - 1 - c), dtype=torch.float64)
            table[r, c] = grpo.group_advantages(group, group_size, eps=eps)[0].abs()
    return table


def expected_advantage(success_rate: float, table: np.ndarray) -> np.ndarray:
    """E|A| of a failure and of a success whose G - 1 group mates each succeed with this probability.  [2, G] -> [2]"""
    mates = table.shape[1] - 1
    chances = [math.comb(mates, c) * success_rate**c * (1 - success_rate) ** (mates - c) for c in range(mates + 1)]
    return table @ np.array(chances)


def likely_tokens(probs: Tensor, token: int, *, cover: float, most: int) -> list[int]:
    """The likeliest tokens, at least 2, until they hold `cover` or are `most`, and the sampled one.  [V] -> k ids"""
    ordered = probs.sort(descending=True)
    needed = int((ordered.values.cumsum(0) < cover).sum()) + 1
    ids = ordered.indices[: min(max(needed, 2), most)].tolist()
    return ids if token in ids else [*ids, token]


def decompose_context(
    p: np.ndarray, index: int, successes: np.ndarray, levels: np.ndarray, rng, draws: int = 100
) -> np.ndarray:
    """Estimate |R| and L of the token `index` of a context from what followed its k forced tokens.  -> [4]

    p [k] sums to 1; successes bool [k, M] of their continuations; levels [2]: E|A| of a failure, of a success.
    Given its reward a completion's |A| does not depend on v, so alpha_v is linear in v's success rate; L and R
    follow by Proposition 1, scope.decompose. The last two numbers are the null: the mean |R| and L when every token
    has the context's own success rate. alpha_v = beta_v then, so that R_v is 0 but for the noise of M continuations.
    """
    rates = successes.mean(axis=1)
    null = rng.binomial(successes.shape[1], min(1.0, p @ rates), size=(draws, len(p))) / successes.shape[1]
    alpha = torch.from_numpy(levels[0] + (levels[1] - levels[0]) * np.concatenate([rates[None], null]))
    _, L, R = scope.decompose(torch.from_numpy(p).expand_as(alpha), alpha)
    L, R = L[:, index].numpy(), np.abs(R[:, index].numpy())
    return np.array([R[0], L[0], R[1:].mean(), L[1:].mean()])


def tightness_ratio(contexts: np.ndarray, weights: np.ndarray) -> tuple[float, float, float, float]:
    """Estimate sum |R| / sum L over n contexts: its value, its 95 % interval, and its value under the null.

    contexts [n, 4] of decompose_context; weights [1 + D, n]: a row of ones, then D bootstrap draws.
    """
    sums = weights @ contexts
    with np.errstate(invalid="ignore"):  # a draw without any L is nan
        ratios, nulls = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    low, high = np.nanquantile(ratios[1:], [0.025, 0.975])
    return float(ratios[0]), float(low), float(high), float(nulls[0])


def bootstrap_weights(problems: list[int], rng, draws: int = 1000) -> np.ndarray:
    """How often each of n contexts counts when their problems are drawn anew; row 0: once each.  -> [1 + draws, n]"""
    names, which = np.unique(problems, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.concatenate([np.ones((1, len(problems))), counts[:, which]])


def main(arguments: list[str]) -> None:
    help.answer(arguments, __doc__, keys_of_an_analysis(KEYS))
    keys = analysis_keys(arguments, KEYS, {"contexts": 1, "continuations": 2, "others": 1, "most": 2})
    configs.require(0 < keys["cover"] < 1, f"cover={keys['cover']}: give a share above 0 and below 1")
    config = settings_of(keys)
    world, rng = distributed.setup(config.precision), np.random.default_rng(config.seed)
    drawn = draw_step(config, world)
    positive = drawn.sampled.mask & (drawn.advantages > 0)[:, None]
    masks = dict(zip(KINDS, (drawn.selected, positive & ~drawn.selected, drawn.forking)))
    chosen = {kind: pick(mask, config.contexts, rng) for kind, mask in masks.items()}
    missing = ", ".join(kind for kind in KINDS if not chosen[kind])
    configs.require(not missing, f"the step has no token that is {missing}: raise group_size or prompts_per_step, or "
                                 "give a model that solves some problems and not others")
    places = sorted(set().union(*chosen.values()), key=lambda place: place[::-1])  # by position: a batch ends together
    contexts, left_out = measure(drawn, places, config, rng, world)
    p = np.array([drawn.sampled.logprobs[place].exp().item() for place in places])
    weights = bootstrap_weights([place[0] // config.group_size for place in places], rng)
    lines = []
    for kind in KINDS:
        some = np.array([place in chosen[kind] for place in places])
        ratio, low, high, null = tightness_ratio(contexts[some], weights[:, some])
        lines.append([kind, str(some.sum()), f"{p[some].mean():.3f}", f"{abs(1 - 2 * p[some]).mean():.3f}",
                      f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{null:.3f}"])
    text = markdown_table(["tokens", "contexts", "mean p", "mean abs(1-2p)", "sum abs(R) / sum L", "95 % interval",
                           "null: noise alone"], lines)
    text += (f"\nProblems are resampled for the intervals. Tokens that were not forced hold {left_out.mean():.4f} of "
             f"the probability on average, {left_out.max():.4f} at most; p is renormalised over the others.\n")
    print(text)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "tightness.md", text)
    print(f"written: {out / 'tightness.md'}")


def pick(mask: Tensor, count: int, rng) -> list[tuple[int, int]]:
    """Up to `count` places (row, position) of a mask [B, C], at random."""
    places = mask.nonzero().tolist()
    return [tuple(places[i]) for i in rng.permutation(len(places))[:count]]


def measure(drawn: Step, places: list, config, rng, world) -> tuple[np.ndarray, np.ndarray]:
    """Force tokens at each of n places (row, position) and follow them.  -> [n, 4], and the probability left out [n]"""
    sampled = drawn.sampled
    table = advantage_table(config.group_size, eps=config.grpo.advantage_eps)
    before = [sampled.tokens[row, :t].tolist() for row, t in places]
    probs = next_token_probs(drawn.run.policy, [sampled.prompts[row] + ids for (row, _), ids in zip(places, before)],
                             temperature=config.temperature, batch_size=config.rollout.batch_size, world=world)
    tokens = [int(sampled.tokens[place]) for place in places]
    forced = [likely_tokens(probs[i], token, cover=config.cover, most=config.most) for i, token in enumerate(tokens)]
    rows = [row for row, _ in places]

    # The success rate of each problem from rollouts of its own: those of the step were looked at to choose the places.
    asked = list(dict.fromkeys(row - row % config.group_size for row in rows))
    plain = follow(drawn, [(row, []) for row in asked], config.others, OTHERS, config, world)
    levels = {row: expected_advantage(rate, table) for row, rate in zip(asked, plain.mean(axis=1))}

    branches = [(row, [*ids, v]) for row, ids, tokens in zip(rows, before, forced) for v in tokens]
    successes = iter(follow(drawn, branches, config.continuations, FORCED, config, world))
    contexts, left_out = [], []
    for i, row in enumerate(rows):
        p = probs[i][forced[i]].double().numpy()
        outcomes = np.stack([next(successes) for _ in forced[i]])
        mates = levels[row - row % config.group_size]
        contexts.append(decompose_context(p / p.sum(), forced[i].index(tokens[i]), outcomes, mates, rng))
        left_out.append(max(0.0, 1 - float(p.sum())))
    return np.array(contexts), np.array(left_out)


@torch.no_grad()
def next_token_probs(policy, sequences: list[list[int]], *, temperature: float, batch_size: int, world) -> Tensor:
    """softmax(logits / temperature) after each of n sequences of token ids.  -> [n, V], on the CPU"""
    rows = []
    for first in range(0, len(sequences), batch_size):
        part = sequences[first : first + batch_size]
        tokens = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        for i, ids in enumerate(part):
            tokens[i, : len(ids)] = torch.tensor(ids)  # causal: what lies to the right of the last token is inert
        last = torch.tensor([len(ids) - 1 for ids in part], device=world.device)
        with world.autocast():
            hidden = hidden_states(policy, tokens.to(world.device))[torch.arange(len(part), device=world.device), last]
            logits = policy.get_output_embeddings()(hidden)
        rows.append(torch.softmax(logits.float() / temperature, dim=-1).cpu())
    return torch.cat(rows)


def follow(drawn: Step, branches: list[tuple[int, list[int]]], count: int, step: int, config, world) -> np.ndarray:
    """Completes each of n branches (row, beginning of the completion) `count` times and grades it.  -> bool [n, count]

    A beginning that ends in a stop token is complete; one that fills max_new_tokens is truncated, as in training.
    """
    room = [0 if ids and ids[-1] in drawn.run.stop else config.max_new_tokens - len(ids) for _, ids in branches]
    live = [i * count + j for i, left in enumerate(room) if left for j in range(count)]
    prompts = [drawn.sampled.prompts[branches[n // count][0]] + branches[n // count][1] for n in live]
    title = "continuations" if step == FORCED else "rollouts of the problems"
    with tqdm(total=len(live), desc=title, unit="sample", leave=False, disable=None) as bar:
        with world.autocast():
            sampled = rollout.sample(
                drawn.run.policy, prompts, live, stop=drawn.run.stop, max_new_tokens=max(room), seed=config.seed,
                step=step, temperature=config.temperature, batch_size=config.rollout.batch_size,
                segment=config.rollout.segment, progress=bar.update)
    lengths = sampled.lengths.tolist()
    ended = {n: sampled.stopped[k].item() and lengths[k] <= room[n // count] for k, n in enumerate(live)}
    added = {n: sampled.tokens[k, : lengths[k]].tolist() for k, n in enumerate(live)}
    whole = [branches[n // count][1] + added.get(n, []) for n in range(len(branches) * count)]
    texts = drawn.run.tokenizer.batch_decode(whole, skip_special_tokens=True)
    problems = [drawn.problems[row // config.group_size] for row, _ in branches]
    complete = [ended.get(n, whole[n][-1] in drawn.run.stop) for n in range(len(whole))]
    grader = config.reward.grader
    correct = [complete[n] and data.is_correct(problems[n // count], texts[n], grader) for n in range(len(whole))]
    return np.array(correct, dtype=bool).reshape(len(branches), count)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1:])
