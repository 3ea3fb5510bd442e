"""Analysis: the entropy-performance law, how tight SCOPE's surrogate is, and where SCOPE acts.

    python analyze.py law runs=runs/grpo,runs/scope   # R = -a e^H + b; do the others lie above the first run's curve?
    python analyze.py tightness model=runs/a/model    # |R|/L on real rollouts, which the paper leaves open (A.23)
    python analyze.py tokens run=runs/a               # which tokens are selected: a table, the terminal, a browser

Tables go to the terminal, files to out=analysis/. `run=` takes a run's model and settings; one process, any device.
"""

import sys
from pathlib import Path

import config as configs

RUN_KEYS = ("model", "prompt.", "prompts_per_step", "seed", "data.", "reward.grader", "group_size", "max_new_tokens",
            "temperature", "grpo.advantage_eps",
            "selection.fraction", "forking_fraction", "rollout.", "evaluation.", "countdown", "toy.")  # fmt: skip
OWN_KEYS = {
    "law": {"runs": "", "out": "analysis"},
    "tightness": {
        "run": "", "out": "analysis",
        "step": 0,  # whose problems of the training order are rolled out
        "contexts": 150,  # of each kind
        "continuations": 64,  # of each forced token (M)
        "others": 64,  # further rollouts of a problem, for its success rate
        "cover": 0.99,  # tokens are forced until they hold this share of the probability ...
        "most": 8,  # ... or are this many
    },
    "tokens": {
        "run": "", "out": "analysis", "step": 0, "reward.kind": "accuracy", "selection.strategy": "scope",
        "shown": 4,  # problems whose completions are shown
    },
}  # fmt: skip


def analysis_keys(arguments: list[str]) -> tuple[str, dict]:
    """What to analyse, and the flat, checked config of it."""
    what, *rest = arguments or ["(nothing)"]
    configs.require(what in OWN_KEYS, f"{what}: say what to analyse, {', '.join(OWN_KEYS)}; for example "
                                      "`analyze.py tokens run=runs/a`")
    keys = OWN_KEYS[what]
    if what != "law":
        keys = {key: value for key, value in configs.read_defaults().items() if key.startswith(RUN_KEYS)} | keys
        run = next((word.removeprefix("run=") for word in rest if word.startswith("run=")), "")
        keys = keys | (run_settings(Path(run), keys) if run else {})
    keys = configs.override(keys, rest)
    configs.require(not Path(keys["out"]).is_file(), f"out={keys['out']} is a file: give a folder")
    if what == "law":
        for folder in configs.listed(keys["runs"]):
            configs.require((Path(folder) / "metrics.jsonl").is_file(),
                            f"runs={folder}: no metrics.jsonl there; give folders of runs, runs=runs/a,runs/b")
        return what, keys
    configs.check(keys)
    least = {"step": 0, "shown": 1, "group_size": 2, "contexts": 1, "continuations": 2, "others": 1, "most": 2}
    for key, low in least.items():
        configs.require(keys.get(key, low) >= low, f"{key}={keys.get(key)}: give at least {low}")
    for key in ("forking_fraction", "cover"):
        configs.require(0 < keys.get(key, 0.5) < 1, f"{key}={keys.get(key)}: give a share above 0 and below 1")
    return what, keys


def run_settings(folder: Path, keys: dict) -> dict:
    """What a run was made with, for the keys asked, and its trained model."""
    import yaml

    for file in ("config.yaml", "model/config.json"):
        configs.require((folder / file).is_file(), f"run={folder}: no {file} there; give the folder of a finished run")
    stored = configs.flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    if stored.get("selection.strategy") == "none":  # plain GRPO: show where SCOPE would act
        del stored["selection.strategy"]
    return {key: stored[key] for key in keys.keys() & stored.keys()} | {"model": str(folder / "model")}


if __name__ == "__main__":
    with configs.one_line_errors():
        WHAT, KEYS = analysis_keys(sys.argv[1:])

import html
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import distributed
import grpo
import plots
import rewards
import rollout
import scope
import step as steps
import toy
from evaluate import aligned
from rollout import Rollout, hidden_states

# ---------------------------------------------------------------- 1 the entropy-performance law


class Fit(NamedTuple):
    """Least squares of R = b - a x at x = e^H, and what its intervals are made of."""

    a: float
    b: float
    spread: float  # standard deviation of the residuals, n - 2 degrees of freedom
    n: int
    center: float  # mean of x
    width: float  # sum of (x - center)^2

    def at(self, x: float) -> tuple[float, float]:
        """The line's value at x = e^H and the standard error of that."""
        return self.b - self.a * x, self.spread * math.sqrt(1 / self.n + (x - self.center) ** 2 / self.width)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """a, b and the ceiling b - a, which is R at H = 0: value and half-width of the 95 % interval."""
        t = t_quantile(0.975, self.n - 2)
        slope = self.spread / math.sqrt(self.width)
        values = {"a": (self.a, slope), "b": self.at(0.0), "b - a": self.at(1.0)}
        return {name: (value, t * error) for name, (value, error) in values.items()}


def fit_law(entropy, performance) -> Fit:
    """R = -a e^H + b through points (H in nats, R), n >= 3, in closed form.  Cui et al. 2025, Eq. 1"""
    x, R = np.exp(np.asarray(entropy, dtype=float)), np.asarray(performance, dtype=float)
    center, width = x.mean(), ((x - x.mean()) ** 2).sum()
    a = -((x - center) * R).sum() / width
    b = R.mean() + a * center
    spread = math.sqrt(((R - b + a * x) ** 2).sum() / (len(x) - 2))
    return Fit(float(a), float(b), spread, len(x), float(center), float(width))


def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t, level >= 1/2: with t = sqrt(freedom) tan(u) its density is cos(u)^(freedom - 1)."""
    u = np.linspace(0, np.pi / 2, 50_001)
    mass = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2)])  # trapezoids
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * level - 1, mass / mass[-1], u)))


def excess(fit: Fit, entropy, performance) -> tuple[float, float, float]:
    """Mean signed residual of another run's n >= 2 points over a fitted curve, its standard error, and t at 97.5 %.

    The line is straight in e^H, so the mean residual is mean R less the line at mean e^H: its error is that of
    the points about their mean residual and that of the line at that place, which no more points would lessen.
    """
    x, R = np.exp(np.asarray(entropy, dtype=float)), np.asarray(performance, dtype=float)
    residual = R - (fit.b - fit.a * x)
    error = math.hypot(residual.std(ddof=1) / math.sqrt(len(x)), fit.at(float(x.mean()))[1])
    return float(residual.mean()), error, t_quantile(0.975, min(len(x) - 1, fit.n - 2))


def evaluation_points(folder: str) -> list[tuple[int, float, float]]:
    """(step, H, R) of every evaluation in a run's metrics.jsonl: entropy in nats, Pass@1 or else Acc@n."""
    file, points = Path(folder) / "metrics.jsonl", []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise configs.UserError(f"{file}, line {number} is not JSON: remove that line") from None
        names = [name for name in row if name == "eval/pass@1"] + [name for name in row if name.startswith("eval/acc")]
        if names and "eval/entropy" in row:
            points.append((row["step"], row["eval/entropy"], row[names[0]]))
    configs.require(len(points) >= 3, f"runs={folder}: {len(points)} evaluations in metrics.jsonl, and a line through "
                                      "fewer than 3 points has no error; train with evaluation.every=10")
    configs.require(len({entropy for _, entropy, _ in points}) > 1, f"runs={folder}: its entropy never changed")
    return points


def law(config, keys: dict) -> None:
    runs = {folder: evaluation_points(folder) for folder in configs.listed(config.runs)}
    fits = {name: fit_law(*zip(*[point[1:] for point in points])) for name, points in runs.items()}
    lines = [["R = -a e^H + b", "points", "H", "R", "a", "b", "ceiling b - a"]]
    for name, points in runs.items():
        _, H, R = zip(*points)
        lines.append([name, str(len(points)), f"{H[0]:.3f} -> {H[-1]:.3f}", f"{R[0]:.3f} -> {R[-1]:.3f}",
                      *(f"{value:+.3f} ±{half:.3f}" for value, half in fits[name].intervals().values())])  # fmt: skip
    few = min(map(len, runs.values()))
    print(aligned(lines))
    print("± is half the 95 % interval (Student's t). A run's points follow from each other, so it is too narrow if "
          "anything" + (f"; {few} points are few: evaluation.every=10 gives more" if few < 10 else "") + ".")
    first = next(iter(runs))
    for name in list(runs)[1:]:
        # Before its first step a run is on nobody's curve: twins share that point, and it is left out.
        later = [point[1:] for point in runs[name] if point[0] > 0]
        mean, error, t = excess(fits[first], *zip(*later))
        side = "above" if mean > t * error else "below" if mean < -t * error else "not beyond noise of"
        print(f"{name}: its {len(later)} points after step 0 lie {mean:+.4f} ±{error:.4f} (standard error) from the "
              f"curve of {first}: {side} it at 95 %")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    print(plots.picture(out / "law.png", lambda plot: draw_law(plot, runs, fits)))


def draw_law(plot, runs: dict, fits: dict):
    figure, axis = plot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, points) in enumerate(runs.items()):
        _, H, R = map(np.array, zip(*points))
        a, b = fits[name].a, fits[name].b
        curve = np.linspace(0, H.max() * 1.05, 100)
        axis.plot(curve, b - a * np.exp(curve), color=f"C{i}", linewidth=1, linestyle="-" if i == 0 else ":")
        if i == 0:
            value, error = np.array([fits[name].at(x) for x in np.exp(curve)]).T
            half = t_quantile(0.975, fits[name].n - 2) * error
            axis.fill_between(curve, value - half, value + half, color="C0", alpha=0.12, linewidth=0)
        axis.plot(H, R, "o-", color=f"C{i}", markersize=5, linewidth=0.4, label=name)
    everything = [R for points in runs.values() for _, _, R in points] + [fits[next(iter(fits))].at(1.0)[0]]
    axis.set(xlabel="entropy H (nats)", ylabel="held-out accuracy R", title="R = -a e$^H$ + b, 95 % band of the first",
             ylim=(max(0, min(everything) - 0.1), min(1, max(everything) + 0.1)))  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------- one step, for 2 and 3

# Of no interest here but read by the step; objective=forking_rl is what marks the forking tokens.
FIXED = {"reward.kind": "accuracy", "objective": "forking_rl", "selection.strategy": "scope",
         "grpo.updates_per_rollout": 1}  # fmt: skip
OTHERS, FORCED = -2, -3  # the `step` of draws that are none of training's, nor evaluation's


@dataclass
class Step:
    """Steps 1-5 of one training step: B rollouts, of len(problems) groups."""

    policy: torch.nn.Module
    tokenizer: object
    stop: list[int]
    problems: list[dict]  # B / group_size
    sampled: Rollout
    correct: Tensor  # [B] bool
    advantages: Tensor  # [B]
    selected: Tensor  # [B, C] bool
    forking: Tensor  # [B, C] bool
    scores: Tensor  # [B, C], Eq. 11


def draw_step(config, world) -> Step:
    """What train.py does in step number config.step of a run, up to the selection."""
    known = rewards.REWARDS
    configs.require(config.reward.kind in known, f"reward={config.reward.kind}: give one of {', '.join(known)}")
    strategy = config.selection.strategy
    configs.require(strategy in scope.STRATEGIES,
                    f"selection.strategy={strategy}: give one of {', '.join(scope.STRATEGIES)}")
    every, _, _ = data.problem_sets(config)
    policy, tokenizer = rollout.load(toy.model_folder(config.model, config))
    every = steps.that_fit(policy.config, tokenizer, every, config)
    configs.require(len(every) >= config.prompts_per_step,
                    f"prompts_per_step={config.prompts_per_step}: there are only {len(every)} problems")
    problems = steps.step_problems(every, config.step, count=config.prompts_per_step, seed=config.seed)
    stop = rollout.stop_ids(policy.to(world.device), tokenizer)
    sampled, _, rewarded, correct = steps.roll_out(policy, tokenizer, stop, every, config.step, config, world)
    advantages = grpo.group_advantages(rewarded, config.group_size, eps=config.grpo.advantage_eps)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, config.seed * 1_000_003 + config.step)
    scores = scope.redistribution_score(sampled.logprobs.exp(), advantages[:, None]) * sampled.mask
    return Step(policy, tokenizer, stop, problems, sampled, correct, advantages, selection.selected, selection.marked,
                scores)  # fmt: skip


# ---------------------------------------------------------------- 2 is the surrogate tight?


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


def covered(probs: Tensor, token: int, *, cover: float, most: int) -> list[int]:
    """The likeliest tokens, at least 2, until they hold `cover` or are `most`, and the sampled one.  [V] -> k ids"""
    ordered = probs.sort(descending=True)
    needed = int((ordered.values.cumsum(0) < cover).sum()) + 1
    ids = ordered.indices[: min(max(needed, 2), most)].tolist()
    return ids if token in ids else [*ids, token]


class Residual(NamedTuple):
    """L and R of one token at one context, estimated, and the same estimates where nothing but noise couples them."""

    L: float
    R: float
    RR: float  # product of R from two independent halves: its mean is R^2, without the noise's square
    null_L: np.ndarray  # [draws]
    null_R: np.ndarray


def residual(p: np.ndarray, place: int, successes: np.ndarray, levels: np.ndarray, rng, draws: int = 100) -> Residual:
    """L_v and R_v of token number `place` of the k tokens forced at a context.  Prop. 1 through scope.decompose

    p [k] sums to 1; successes bool [k, M] of their continuations; levels [2]: E|A| of a failure, of a success.
    Given its reward a completion's |A| does not depend on v, so alpha_v is linear in v's success rate.
    The null draws give every token the context's own success rate: alpha_v = beta_v, and R_v = 0 but for noise.
    """
    half = successes.shape[1] // 2
    rates = [part.mean(axis=1) for part in (successes, successes[:, :half], successes[:, half:])]
    null = rng.binomial(successes.shape[1], min(1.0, p @ rates[0]), size=(draws, len(p))) / successes.shape[1]
    alpha = torch.from_numpy(levels[0] + (levels[1] - levels[0]) * np.concatenate([rates, null]))
    _, L, R = scope.decompose(torch.from_numpy(p).expand_as(alpha), alpha)
    L, R = L[:, place].numpy(), R[:, place].numpy()
    return Residual(L[0], R[0], R[1] * R[2], L[3:], R[3:])


def summarise(rows: list[Residual], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of n contexts under every row of weights [D, n] (row 0: all ones, then bootstrap).  -> name: [D]

    A context whose L is 0 (no success seen, nor among the others) has no ratio and adds nothing to a sum.
    """
    L, R, RR, null_L, null_R = (np.array(column) for column in zip(*rows))

    def mean(top, bottom):  # over contexts, and over draws if there are any, of what has a ratio
        ratios = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        axes = tuple(range(1, top.ndim))
        return (weights @ ratios.sum(axis=axes)) / (weights @ (bottom > 0).sum(axis=axes))

    with np.errstate(invalid="ignore"):  # a bootstrap draw without any ratio is nan
        return {
            "mean": mean(np.abs(R), L),
            "mean_floor": mean(np.abs(null_R), null_L),
            "rms_corrected": np.sqrt(np.maximum(0, mean(RR, L**2))),
            "sums": (weights @ np.abs(R)) / (weights @ L),
            "sums_floor": ((weights @ np.abs(null_R)) / (weights @ null_L)).mean(axis=1),
        }


def bootstrap_weights(problems: list[int], rng, draws: int = 1000) -> np.ndarray:
    """How often each of n contexts counts when their problems are drawn anew; row 0: once each.  -> [1 + draws, n]"""
    names, which = np.unique(problems, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.concatenate([np.ones((1, len(problems))), counts[:, which]])


EDGES = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)  # of p_v
KINDS = ("selected", "positive, unselected", "forking")
IN_PLAY = "forking in play"  # of them, where the forced tokens fared differently: elsewhere no branch is defined


def tightness(config, keys: dict) -> None:
    world, rng = distributed.setup(), np.random.default_rng(config.seed)
    drawn = draw_step(config, world)
    positive = drawn.sampled.mask & (drawn.advantages > 0)[:, None]
    masks = dict(zip(KINDS, (drawn.selected, positive & ~drawn.selected, drawn.forking)))
    chosen = {kind: pick(mask, config.contexts, rng) for kind, mask in masks.items()}
    missing = ", ".join(kind for kind in KINDS if not chosen[kind])
    configs.require(not missing, f"the step has no token that is {missing}: raise group_size or prompts_per_step, or "
                                 "give a model that solves some problems and not others")
    places = sorted(set().union(*chosen.values()), key=lambda place: place[::-1])  # by position: a batch ends together
    measured = measure(drawn, places, config, rng, world)
    rows = [row for row, _ in measured]
    problems = [place[0] // config.group_size for place in places]
    p = np.array([drawn.sampled.logprobs[place].exp().item() for place in places])
    members = {kind: np.array([place in chosen[kind] for place in places]) for kind in KINDS}
    in_play = members["forking"] & np.array([abs(row.R) > 1e-9 * row.L for row in rows])
    members |= {IN_PLAY: in_play} if in_play.any() else {}
    weights = bootstrap_weights(problems, rng)

    def figures(some: np.ndarray) -> dict[str, np.ndarray]:
        return summarise([rows[i] for i in some.nonzero()[0]], weights[:, some])

    by_kind = {kind: figures(some) for kind, some in members.items()}
    by_p = {(kind, low, high): (figures(here), int(here.sum())) for kind, some in members.items()
            for low, high in zip(EDGES, EDGES[1:]) if (here := some & (p > low) & (p <= high)).any()}  # fmt: skip
    sentence = verdict(by_kind)
    print(tightness_tables(by_kind, by_p, rows, members, p, [left for _, left in measured]))
    print(sentence)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    contexts = [{"row": row, "position": t, "problem": drawn.problems[problem], "p": p[i],
                 "kinds": [kind for kind in members if members[kind][i]], "left_out": left,
                 "L": found.L, "R": found.R, "R^2 unbiased": found.RR}
                for i, ((row, t), problem, (found, left)) in enumerate(zip(places, problems, measured))]  # fmt: skip
    summary = {kind: {name: with_error(values) for name, values in own.items()} for kind, own in by_kind.items()}
    report = {"settings": keys, "kinds": summary, "verdict": sentence, "contexts": contexts}
    configs.replace_text(out / "tightness.json", json.dumps(report, indent=1) + "\n")
    print(f"written: {out / 'tightness.json'}")
    ratios = np.array([abs(row.R) / row.L if row.L > 0 else np.nan for row in rows])
    print(plots.picture(out / "tightness.png", lambda plot: draw_tightness(plot, p, ratios, members, by_kind)))


def pick(mask: Tensor, count: int, rng) -> list[tuple[int, int]]:
    """Up to `count` places (row, position) of a mask [B, C], at random."""
    places = mask.nonzero().tolist()
    return [tuple(places[i]) for i in rng.permutation(len(places))[:count]]


def measure(drawn: Step, places: list, config, rng, world) -> list[tuple[Residual, float]]:
    """Forces tokens at each place (row, position) and follows them: its residual, and the probability left out."""
    sampled = drawn.sampled
    table = advantage_table(config.group_size, eps=config.grpo.advantage_eps)
    before = [sampled.tokens[row, :t].tolist() for row, t in places]
    probs = next_token_probs(drawn.policy, [sampled.prompts[row] + ids for (row, _), ids in zip(places, before)],
                             temperature=config.temperature, batch_size=config.rollout.batch_size, world=world)
    tokens = [int(sampled.tokens[place]) for place in places]
    forced = [covered(probs[i], token, cover=config.cover, most=config.most) for i, token in enumerate(tokens)]
    rows = [row for row, _ in places]

    # The success rate of each problem from rollouts of its own: those of the step were looked at to choose the places.
    asked = list(dict.fromkeys(row - row % config.group_size for row in rows))
    plain = follow(drawn, [(row, []) for row in asked], config.others, OTHERS, config, world)
    levels = {row: expected_advantage(rate, table) for row, rate in zip(asked, plain.mean(axis=1))}

    branches = [(row, [*ids, v]) for row, ids, tokens in zip(rows, before, forced) for v in tokens]
    successes = iter(follow(drawn, branches, config.continuations, FORCED, config, world))
    found = []
    for i, row in enumerate(rows):
        p = probs[i][forced[i]].double().numpy()
        own = np.stack([next(successes) for _ in forced[i]])
        mates = levels[row - row % config.group_size]
        found.append((residual(p / p.sum(), forced[i].index(tokens[i]), own, mates, rng), max(0.0, 1 - float(p.sum()))))
    return found


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
    room = [0 if ids and ids[-1] in drawn.stop else config.max_new_tokens - len(ids) for _, ids in branches]
    live = [i * count + j for i, left in enumerate(room) if left for j in range(count)]
    prompts = [drawn.sampled.prompts[branches[n // count][0]] + branches[n // count][1] for n in live]
    title = "continuations" if step == FORCED else "rollouts of the problems"
    with tqdm(total=len(live), desc=title, unit="sample", leave=False) as bar:
        with world.autocast():
            sampled = rollout.sample(
                drawn.policy, prompts, live, stop=drawn.stop, max_new_tokens=max(room), seed=config.seed, step=step,
                temperature=config.temperature, batch_size=config.rollout.batch_size, segment=config.rollout.segment,
                progress=bar.update,
            )  # fmt: skip
    lengths = sampled.lengths.tolist()
    ended = {n: sampled.stopped[k].item() and lengths[k] <= room[n // count] for k, n in enumerate(live)}
    added = {n: sampled.tokens[k, : lengths[k]].tolist() for k, n in enumerate(live)}
    whole = [branches[n // count][1] + added.get(n, []) for n in range(len(branches) * count)]
    texts = drawn.tokenizer.batch_decode(whole, skip_special_tokens=True)
    asked = [drawn.problems[row // config.group_size] for row, _ in branches]
    finished = [ended.get(n, whole[n][-1] in drawn.stop) for n in range(len(whole))]
    grader = config.reward.grader
    correct = [done and data.is_correct(asked[n // count], texts[n], grader) for n, done in enumerate(finished)]
    return np.array(correct, dtype=bool).reshape(len(branches), count)


def with_error(values: np.ndarray) -> tuple[float, float]:
    """The estimate, and its standard error: the spread of the bootstrap."""
    return float(values[0]), float(np.nanstd(values[1:]))


def tightness_tables(by_kind: dict, by_p: dict, rows: list, members: dict, p: np.ndarray, left_out: list) -> str:
    def cell(figures: dict, name: str) -> str:
        value, error = with_error(figures[name])
        floor = figures.get(f"{name}_floor")
        return f"{value:.3f} ±{error:.3f}" + (f" ({floor[0]:.3f})" if floor is not None else "")

    lines = [["", "contexts", "no L", "R = 0", "mean p", "mean |1-2p|",
              "mean |R|/L", "rms |R|/L, corrected", "sum |R| / sum L"]]  # fmt: skip
    for kind, figures in by_kind.items():
        own = p[members[kind]]
        inside = [row for row, member in zip(rows, members[kind]) if member]
        counts = (len(own), sum(row.L == 0 for row in inside), sum(abs(row.R) <= 1e-9 * row.L != 0 for row in inside))
        lines.append([kind, *map(str, counts), f"{own.mean():.3f}", f"{abs(1 - 2 * own).mean():.3f}",
                      *(cell(figures, name) for name in ("mean", "rms_corrected", "sums"))])  # fmt: skip
    bins = [["mean |R|/L at p_v", *by_kind]]
    for low, high in zip(EDGES, EDGES[1:]):
        found = [by_p.get((kind, low, high)) for kind in by_kind]
        bins.append([f"{low:g} - {high:g}", *(f"{cell(f[0], 'mean')} n={f[1]}" if f else "-" for f in found)])
    return (f"{aligned(lines)}\n\n{aligned(bins)}\n"
            "± standard error, problems bootstrapped; in brackets: what noise alone would give, alpha equal for all v."
            "\nNoise in alpha makes |R| too large; `corrected` is free of it, made of R from two independent halves."
            "\nno L: no success seen, so no ratio. R = 0: all forced tokens fared the same, as where the chain is lost."
            f"\nProbability of tokens not forced: mean {np.mean(left_out):.4f}, largest {np.max(left_out):.4f}; p is "
            "renormalised over the others.")  # fmt: skip


def verdict(by_kind: dict) -> str:
    """What the figures say of A.23: is the mean |R|/L smaller at the selected tokens than at forking ones?"""
    selected, parts, sides = by_kind["selected"], [], []
    for kind in [kind for kind in ("forking", IN_PLAY) if kind in by_kind]:
        difference = selected["mean"][1:] - by_kind[kind]["mean"][1:]
        low, high = np.quantile(difference[np.isfinite(difference)], [0.025, 0.975])
        sides.append("smaller than" if high < 0 else "larger than" if low > 0 else "not measurably different from")
        value, floor = by_kind[kind]["mean"][0], by_kind[kind]["mean_floor"][0]
        parts.append(f"{sides[-1]} {value:.3f} ({floor:.3f}) at '{kind}' tokens "
                     f"[difference {low:+.3f} to {high:+.3f} at 95 %]")
    verdicts = {"smaller than": "bears A.23 out", "larger than": "contradicts A.23"}
    judged = verdicts.get(sides[0] if len(set(sides)) == 1 else "", "does not bear A.23 out")
    return ("A.23 says that |R|/L is smaller at selected tokens than at branch-defining ones at large; measured, it is "
            f"{selected['mean'][0]:.3f} (noise alone {selected['mean_floor'][0]:.3f}) at selected tokens, "
            f"{', '.join(parts)}, which {judged}; at unselected tokens of positive advantage it is "
            f"{by_kind['positive, unselected']['mean'][0]:.3f}.")


def draw_tightness(plot, p: np.ndarray, ratios: np.ndarray, members: dict, by_kind: dict):
    figure, (left, right) = plot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1), layout="constrained")
    for i, (kind, some) in enumerate(members.items()):
        if kind in KINDS:
            left.plot(p[some], ratios[some], "osD"[i], color=f"C{i}", markersize=4, alpha=0.6, linewidth=0)
        for x, name in enumerate(("mean", "rms_corrected", "sums")):
            value, error = with_error(by_kind[kind][name])
            at = x + (i - 1.5) * 0.2
            right.bar(at, value, 0.18, yerr=error, color=f"C{i}", capsize=2, label=kind if x == 0 else None)
            if f"{name}_floor" in by_kind[kind]:
                right.plot([at - 0.09, at + 0.09], [by_kind[kind][f"{name}_floor"][0]] * 2, "k--", linewidth=1)
    grid = np.linspace(0, 1, 201)
    left.plot(grid, abs(1 - 2 * grid) / 2, color="grey", linewidth=1, label="|1 - 2p| / 2: |α - β| = A_scale")
    left.set(xlabel="p of the sampled token", ylabel="|R| / L", title="each context", ylim=(0, None))
    left.set_yscale("symlog", linthresh=0.1)  # straight up to 0.1: most are near 0, some at p near 1 are large
    right.set(title="by kind; dashed: noise alone", xticks=range(3), ylim=(0, None))
    right.set_xticklabels(["mean", "rms,\ncorrected", "sum |R| /\nsum L"])
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


# ---------------------------------------------------------------- 3 where does SCOPE act?

ROLES = ("operator", "operand", "result", "separator", "stop", "other")


def role_of_tokens(tokens: list[str], *, stop: tuple[str, ...] = ("<eos>",)) -> list[str]:
    """What each token of a Countdown chain is: the numbers between `=` and what follows are results, others operands.

    >>> role_of_tokens(["3", "*", "5", "=", "15", ",", "<eos>"])
    ['operand', 'operator', 'operand', 'separator', 'result', 'separator', 'stop']
    """
    roles, is_result = [], False
    for token in tokens:
        word = token.strip()
        if token in stop:
            role = "stop"
        elif word.isdecimal():  # also a number in pieces: all pieces after `=` are the result's
            role = "result" if is_result else "operand"
        else:
            role = "operator" if word in {"+", "-", "*", "/"} else "separator" if word in {"=", ","} else "other"
            is_result = word == "="
        roles.append(role)
    return roles


def role_table(roles: list[str], chosen: list[bool], p: list[float], scores: list[float]) -> str:
    """Each role's share of all tokens and of the selected ones, and their quotient."""
    every, taken = Counter(roles), Counter(role for role, is_chosen in zip(roles, chosen) if is_chosen)
    lines = [["role", "tokens", "share", "selected", "share of selected", "enrichment", "mean p", "mean score"]]
    for role in [role for role in ROLES if every[role]]:
        share, of_selected = every[role] / len(roles), taken[role] / max(1, taken.total())
        own = [i for i, other in enumerate(roles) if other == role]
        lines.append([role, str(every[role]), f"{share:.1%}", str(taken[role]), f"{of_selected:.1%}",
                      f"{of_selected / share:.2f}", f"{np.mean([p[i] for i in own]):.3f}",
                      f"{np.mean([scores[i] for i in own]):.3f}"])  # fmt: skip
    return aligned(lines)


class View(NamedTuple):
    """One token as it is shown."""

    text: str
    role: str
    p: float
    entropy: float
    advantage: float
    score: float
    selected: bool


def views(drawn: Step, row: int) -> list[View]:
    """The tokens of one completion."""
    sampled, valid = drawn.sampled, slice(0, int(drawn.sampled.lengths[row]))
    texts = [drawn.tokenizer.decode([token]) for token in sampled.tokens[row, valid].tolist()]
    roles = role_of_tokens(texts, stop=tuple(drawn.tokenizer.decode([token]) for token in drawn.stop))
    columns = [sampled.logprobs.exp(), sampled.entropy, drawn.advantages[:, None].expand_as(sampled.mask), drawn.scores,
               drawn.selected]  # fmt: skip
    return [View(*values) for values in zip(texts, roles, *(column[row, valid].tolist() for column in columns))]


def ansi(tokens: list[View], largest: float) -> str:
    """A completion for the terminal: the redder, the higher the score; selected tokens bold and underlined."""
    reds = (None, 224, 217, 210, 203, 196)  # of the 256 colours, from pale to full
    words = []
    for token in tokens:
        red = reds[round(5 * token.score / largest)] if largest > 0 else None
        codes = ([f"48;5;{red}", "30"] if red else []) + (["1", "4"] if token.selected else [])
        text = token.text.replace("\n", "⏎").replace("\x1b", "")
        words.append(f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text)
    return " ".join(words)


STYLE = """body { font: 15px/1.9 monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
span { padding: 2px 5px; border-radius: 3px; border: 2px solid transparent; cursor: help }
.selected { border-color: #b00020; font-weight: bold }
h2 { font-size: 1em; margin: 1.6em 0 0.2em } .verdict { color: #777; display: inline-block; width: 9em }
pre { line-height: 1.3 }"""


def html_page(title: str, table: str, groups: list[tuple[str, list[tuple[str, list[View]]]]], largest: float) -> str:
    """One page without outside resources. groups: (prompt, [(verdict, tokens of a completion)])."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
             f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><pre>{html.escape(table)}</pre>"
             "<p>Shaded by score p(1-p)[A]+, selected tokens framed; rest the mouse on a token for its figures.</p>"]
    for prompt, completions in groups:
        parts.append(f"<h2>{html.escape(prompt)}</h2>")
        for graded, tokens in completions:
            words = "\n".join(html_token(token, largest) for token in tokens)
            parts.append(f"<div><i class=verdict>{html.escape(graded)}</i>{words}</div>")
    return "\n".join(parts) + "\n"


def html_token(token: View, largest: float) -> str:
    shade = token.score / largest if largest > 0 else 0.0
    tip = (f"{token.role}: p {token.p:.3f}, entropy {token.entropy:.3f}, advantage {token.advantage:+.3f}, "
           f"score {token.score:.3f}{', selected' if token.selected else ''}")  # fmt: skip
    mark = ' class="selected"' if token.selected else ""
    text = html.escape(token.text.replace("\n", "⏎"))
    return f'<span{mark} style="background: rgba(255, 90, 60, {shade:.2f})" title="{html.escape(tip)}">{text}</span>'


def tokens(config, keys: dict) -> None:
    drawn = draw_step(config, distributed.setup())
    every = [views(drawn, row) for row in range(len(drawn.correct))]
    flat = [token for row in every for token in row]
    table = role_table([t.role for t in flat], [t.selected for t in flat], [t.p for t in flat], [t.score for t in flat])
    title = f"{config.model}, step {config.step}: {config.selection.strategy} selects"
    title += f" {sum(t.selected for t in flat)} of {len(flat)} tokens"
    print(f"{title}\n{table}\n")

    largest = drawn.scores.max().item()
    most = sorted(range(len(drawn.problems)), key=lambda g: -drawn.selected[group_rows(g, config)].sum().item())
    shown = most[: config.shown]  # the problems with most selected tokens: in a group of equal rewards there are none
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    groups = []
    for group in shown:
        rows = range(*group_rows(group, config).indices(len(every)))
        prompt = drawn.tokenizer.decode(drawn.sampled.prompts[rows[0]])
        verdicts = ["right" if drawn.correct[row] else "wrong" for row in rows]
        groups.append((prompt, [(f"{graded} A {drawn.advantages[row]:+.2f}", every[row])
                                for graded, row in zip(verdicts, rows)]))  # fmt: skip
        print(prompt)
        for graded in sorted(set(verdicts)):  # one of each
            row = every[rows[verdicts.index(graded)]]
            line = ansi(row, largest) if colour else " ".join(f"[{t.text}]" if t.selected else t.text for t in row)
            print(f"  {graded}  {line}")
    print("shaded by score, selected underlined" if colour else "[selected]; with colours on a terminal")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    configs.replace_text(out / "tokens.html", html_page(title, table, groups, largest))
    print(f"written: {out / 'tokens.html'}")


def group_rows(group: int, config) -> slice:
    return slice(group * config.group_size, (group + 1) * config.group_size)


def main(what: str, keys: dict) -> None:
    configs.require(os.environ.get("WORLD_SIZE", "1") == "1", "analyze.py is one process: start it with python")
    config = configs.namespace(configs.nest(keys if what == "law" else FIXED | keys))
    {"law": law, "tightness": tightness, "tokens": tokens}[what](config, keys)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(WHAT, KEYS)
