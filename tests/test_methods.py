"""Every method of the paper against a slow float64 reference written from its formula: loops, no vectorisation."""

import math
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from gradient_worker import by_length, moved, step_gradient
from test_train import ALONE, SMALL, assert_same_gradient, config_of, metrics_of

import config as configs
import data
import grpo
import rewards
import rollout
import scope
import step as steps
import toy
import train

N = 400


@pytest.fixture(scope="module")
def tokens():
    """A made-up step: 5-token distributions, one sampled token each, advantages of both signs and some zeros."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(N, 5, generator=generator, dtype=torch.float64), dim=1)
    y = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    advantages = torch.randn(N, generator=generator, dtype=torch.float64).round(decimals=1)
    advantages[::7] = 0
    rows = []
    for i in range(N):
        p = probs[i].tolist()
        H = -sum(x * math.log(x) for x in p)
        rows.append({"p": p, "y": int(y[i]), "A": advantages[i].item(), "H": H, "logp": math.log(p[y[i]]),
                     "collision": sum(x * x * (math.log(x) + H) for x in p)})  # fmt: skip
    keys = {"logprobs": "logp", "entropy": "H", "advantages": "A", "collision": "collision"}
    columns = {name: torch.tensor([row[key] for row in rows], dtype=torch.float64) for name, key in keys.items()}
    return SimpleNamespace(rows=rows, columns=columns)


def chosen_of(tokens, strategy, *, seed=0, fraction=0.05, forking=0.2):
    mask = scope.select_tokens(strategy, fraction=fraction, seed=seed, forking_fraction=forking, **tokens.columns)
    return set(mask.nonzero().flatten().tolist())


# ---------------------------------------------------------------- selections


def forking_set(tokens, share=0.2):
    ranked = sorted(range(N), key=lambda i: -tokens.rows[i]["H"])
    return set(ranked[: round(share * N)])


RANDOM = {  # strategy: candidates by definition
    "uniform": lambda t, forking: set(range(N)),
    "positive": lambda t, forking: {i for i in range(N) if t.rows[i]["A"] > 0},
    "forking": lambda t, forking: forking,
    "forking_positive": lambda t, forking: {i for i in forking if t.rows[i]["A"] > 0},
    "non_forking": lambda t, forking: set(range(N)) - forking,
}


@pytest.mark.parametrize("strategy", RANDOM)
def test_random_strategies_draw_from_their_candidates(tokens, strategy):
    """K without replacement, every candidate alike, none other; another seed, another draw."""
    candidates = RANDOM[strategy](tokens, forking_set(tokens))
    counts = dict.fromkeys(range(N), 0)
    draws = 300
    for seed in range(draws):
        chosen = chosen_of(tokens, strategy, seed=seed)
        assert len(chosen) == 20 and chosen <= candidates
        for i in chosen:
            counts[i] += 1
    rate = 20 / len(candidates)
    deviations = [(counts[i] - draws * rate) / math.sqrt(draws * rate * (1 - rate)) for i in candidates]
    assert max(map(abs, deviations)) < 4.5
    assert sum(d * d for d in deviations) / len(deviations) < 1.5  # variance of a fair draw: 1


def test_a_small_candidate_set_is_taken_whole(tokens):
    forking = forking_set(tokens, 0.02)
    expected = {i for i in forking if tokens.rows[i]["A"] > 0}
    assert 0 < len(expected) < 20
    assert chosen_of(tokens, "forking_positive", forking=0.02) == expected


def mean(values):
    return sum(values) / len(values)


def scores(tokens, strategy):
    rows = tokens.rows
    mean_logp, mean_A = mean([row["logp"] for row in rows]), mean([row["A"] for row in rows])

    def score(row):
        p, A = row["p"][row["y"]], row["A"]
        match strategy:
            case "scope":
                return p * (1 - p) * max(A, 0)
            case "covariance":
                return (row["logp"] - mean_logp) * (A - mean_A)
            case "geometry":
                return p * (1 - p)
            case "advantage":
                return max(A, 0)
            case "magnitude":
                return p * (1 - p) * abs(A)
            case "entropy_change":
                inner = p * (math.log(p) + row["H"]) - sum(x**2 * (math.log(x) + row["H"]) for x in row["p"])
                return max(A * inner, 0)

    return [score(row) for row in rows]


@pytest.mark.parametrize("strategy", ["scope", "covariance", "geometry", "advantage", "magnitude", "entropy_change"])
@pytest.mark.parametrize("fraction", [0.05, 0.6])
def test_ranking_strategies_take_the_largest_scores(tokens, strategy, fraction):
    values = scores(tokens, strategy)
    chosen = chosen_of(tokens, strategy, fraction=fraction)
    eligible = [i for i in range(N) if strategy == "covariance" or values[i] > 0]
    budget = min(round(fraction * N), len(eligible))
    assert len(chosen) == budget and chosen <= set(eligible)
    floor = sorted((values[i] for i in eligible), reverse=True)[budget - 1]
    assert min(values[i] for i in chosen) == pytest.approx(floor, rel=1e-9)  # ties at the floor are free
    assert {i for i in eligible if values[i] > floor + 1e-12} <= chosen


def test_zero_variance_groups_may_be_chosen_by_those_who_may():
    """Tokens without an advantage keep their KL under the strategies that look at entropy or chance alone."""
    idle = {"logprobs": torch.log(torch.rand(N)), "entropy": torch.rand(N), "advantages": torch.zeros(N)}
    for strategy in ("uniform", "forking", "non_forking", "covariance", "geometry", "all"):
        assert scope.select_tokens(strategy, fraction=0.05, seed=0, **idle).any(), strategy
    for strategy in ("positive", "forking_positive", "scope", "advantage", "magnitude"):
        assert not scope.select_tokens(strategy, fraction=0.05, seed=0, **idle).any(), strategy


def test_entropy_change_is_the_slope_of_the_entropy():
    """-dH/eta by finite differences: one logit step eta A (1[y] - pi) at each context."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        z = 2 * torch.randn(6, generator=generator, dtype=torch.float64)
        y, A, eta = int(torch.randint(6, (1,), generator=generator)), torch.randn(1, generator=generator).item(), 1e-5
        p = torch.softmax(z, 0)

        def entropy(z):
            p = torch.softmax(z, 0)
            return -(p * p.log()).sum().item()

        direction = A * (torch.eye(6, dtype=torch.float64)[y] - p)
        slope = (entropy(z + eta * direction) - entropy(z - eta * direction)) / (2 * eta)
        H = torch.tensor([entropy(z)], dtype=torch.float64)
        collision = grpo.token_collision(z[None], temperature=1.0)
        score = scope.entropy_change_score(p[y : y + 1].log(), H, torch.tensor([A], dtype=torch.float64), collision)
        assert score.item() == pytest.approx(max(-slope, 0), rel=1e-5, abs=1e-9)


def test_k3_expectations():
    """By enumeration over y ~ pi: mean k3 = KL(pi || ref); mean gradient of k3 = gradient of KL(ref || pi), of k1 = 0,
    of k2 = gradient of KL(pi || ref)."""
    generator = torch.Generator().manual_seed(2)
    z, z_ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    logp, log_ref = torch.log_softmax(z, 0), torch.log_softmax(z_ref, 0)
    weight = logp.detach().exp()
    reverse, forward = (logp.exp() * (logp - log_ref)).sum(), (log_ref.exp() * (log_ref - logp)).sum()
    k1, k2, k3 = logp - log_ref, (logp - log_ref) ** 2 / 2, scope.k3(logp, log_ref)

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    assert (weight * k3).sum().item() == pytest.approx(reverse.item(), rel=1e-12)
    torch.testing.assert_close(gradient((weight * k3).sum()), gradient(forward), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient((weight * k2).sum()), gradient(reverse), rtol=1e-10, atol=1e-14)
    assert gradient((weight * k1).sum()).abs().max() < 1e-14


# ---------------------------------------------------------------- objectives


B, COEF, LOW, HIGH = 6, 0.3, 0.2, 0.28


@pytest.fixture(scope="module")
def completions():
    """Six completions of unequal length, off-policy, in loops' own data structure."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for b in range(B):
        length = 3 + 2 * b
        old = -2 * torch.rand(length, generator=generator, dtype=torch.float64)
        moved = old + 0.4 * torch.randn(length, generator=generator, dtype=torch.float64)
        rows.append({
            "old": old.tolist(),
            "logp": moved.clamp(max=-1e-3).tolist(),
            "A": torch.randn(1, generator=generator).item(),
            "correct": b % 2 == 0,
            "marked": (torch.rand(length, generator=generator) < 0.3).tolist(),
        })  # fmt: skip
    return rows


def slow_ppo(logp, old, A, low, high):
    rho = math.exp(logp - old)
    return -min(rho * A, min(max(rho, 1 - low), 1 + high) * A)


def slow_objective(rows, objective, normaliser):
    """The loss as the papers write it: per token, then a mean over tokens, or over completions of their means."""
    losses = []  # of each completion: its kept tokens' losses
    for row in rows:
        kept = []
        for logp, old, marked in zip(row["logp"], row["old"], row["marked"]):
            rho = math.exp(logp - old)
            if objective == "forking_rl" and not marked:
                continue
            if objective == "kl_cov":
                kept.append(-rho * row["A"] + (COEF * abs(logp - old) if marked else 0))
            elif objective == "clip_cov":
                kept.append(0.0 if marked else slow_ppo(logp, old, row["A"], 1.0, 1.0))
            else:
                kept.append(slow_ppo(logp, old, row["A"], LOW, HIGH))
        losses.append(kept)
    if normaliser == "token":
        loss = sum(map(sum, losses)) / sum(map(len, losses))
    else:
        loss = sum(sum(kept) / max(len(kept), 1) for kept in losses) / B
    if objective == "div":
        for row in rows:
            if row["correct"]:
                terms = [math.exp(logp - old) * logp for logp, old in zip(row["logp"], row["old"])]
                loss += COEF * sum(terms) / len(terms) / B
    return loss


def fast_objective(rows, objective, normaliser, logprobs):
    """The same through grpo.OBJECTIVES, with the weights that step.micro_batches makes."""
    lengths = [len(row["logp"]) for row in rows]
    flat = [(b, t) for b in range(B) for t in range(lengths[b])]
    marked = torch.tensor([rows[b]["marked"][t] for b, t in flat])
    kept = marked if objective == "forking_rl" else torch.ones_like(marked)
    kept_in_row = [sum(int(kept[i]) for i, (b, _) in enumerate(flat) if b == row) for row in range(B)]
    weight = [1 / int(kept.sum()) if normaliser == "token" else 1 / (max(kept_in_row[b], 1) * B) for b, _ in flat]
    tokens = grpo.Tokens(
        logprobs, torch.tensor([rows[b]["old"][t] for b, t in flat], dtype=torch.float64),
        torch.tensor([rows[b]["A"] for b, _ in flat], dtype=torch.float64),
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor([1 / (lengths[b] * B) for b, _ in flat], dtype=torch.float64), marked,
        torch.tensor([rows[b]["correct"] for b, _ in flat]),
    )  # fmt: skip
    low, high = grpo.CLIPS.get(objective, (LOW, HIGH))
    return grpo.OBJECTIVES[objective](tokens, clip_low=low, clip_high=high, coef=COEF)


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
@pytest.mark.parametrize("objective", grpo.OBJECTIVES)
def test_objectives_value_and_gradient(completions, objective, normaliser):
    logprobs = torch.tensor([x for row in completions for x in row["logp"]], dtype=torch.float64, requires_grad=True)
    loss = fast_objective(completions, objective, normaliser, logprobs)
    loss.backward()
    assert loss.item() == pytest.approx(slow_objective(completions, objective, normaliser), rel=1e-12)
    i, h = 0, 1e-6
    for row in completions:
        for t, x in enumerate(row["logp"]):
            values = []
            for sign in (1, -1):
                row["logp"][t] = x + sign * h
                values.append(slow_objective(completions, objective, normaliser))
            row["logp"][t] = x
            assert logprobs.grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-9)
            i += 1


def test_clip_cov_tokens():
    """Only 1 < C < 5 and not clipped already; round(fraction N) of them at random, or all if fewer."""
    covariance = torch.linspace(-2, 8, 1001)
    clipped = torch.arange(1001) % 3 == 0
    candidates = [i for i in range(1001) if 1 < covariance[i] < 5 and i % 3]
    seen = set()
    for seed in range(60):
        marked = grpo.clip_cov_tokens(covariance, clipped, fraction=0.05, low=1.0, high=5.0, seed=seed)
        chosen = set(marked.nonzero().flatten().tolist())
        assert len(chosen) == 50 and chosen <= set(candidates)
        seen |= chosen
    assert len(seen) > 0.99 * len(candidates)
    everything = grpo.clip_cov_tokens(covariance, clipped, fraction=1.0, low=1.0, high=5.0, seed=0)
    assert everything.nonzero().flatten().tolist() == candidates


def test_kl_cov_on_policy_is_grpo():
    """One update per rollout: the penalty's subgradient is 0 at equality, so its words change nothing."""
    _, plain, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none")
    _, with_cov, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none",
                                   more=["objective=kl_cov", "kl_cov.coef=50.0", "kl_cov.fraction=0.5"])  # fmt: skip
    assert_same_gradient(plain, with_cov, tolerance=1e-7)


def test_marked_tokens_of_each_objective():
    """forking_rl marks the forking tokens, kl_cov the highest covariances, in the step itself."""
    marks = {}
    for objective in ("grpo", "div", "forking_rl", "kl_cov", "clip_cov"):
        config = config_of(f"objective={objective}", "kl_cov.fraction=0.1", "clip_cov.fraction=0.1", "clip_cov.low=0.1")
        policy = tiny_model()
        prompts = [[2, 3 + i] for i in range(16)]  # all different: no two tokens share a distribution
        sampled = rollout.sample(policy, prompts, list(range(16)), stop=[1], max_new_tokens=9, seed=0, step=0)
        advantages = grpo.group_advantages(torch.arange(16.0) % 5, 8)
        marks[objective] = steps.select(sampled, sampled.logprobs, advantages, config, seed=0)
    flat = marks["grpo"].flat
    n = len(flat["logprobs"])
    assert not marks["grpo"].marked.any() and not marks["div"].marked.any()
    forking = flat["entropy"] >= flat["entropy"].sort(descending=True).values[round(0.2 * n) - 1]
    assert (marks["forking_rl"].flat["marked"] == forking).all()
    covariance = scope.covariance_score(flat["logprobs"], flat["advantages"])
    assert (marks["kl_cov"].flat["marked"] == (covariance >= covariance.sort().values[-round(0.1 * n)])).all()
    clip = marks["clip_cov"].flat["marked"]
    assert 0 < clip.sum() <= round(0.1 * n) and (covariance[clip] > 0.1).all()


@pytest.mark.parametrize("objective", grpo.OBJECTIVES)
def test_scope_leaves_the_objectives_own_gradient_untouched(objective):
    """(objective + SCOPE) - objective is one and the same vector for every objective: the penalty's gradient."""

    def penalty(objective):
        more = [f"objective={objective}", "div.coef=0.5", "clip_cov.fraction=0.2", "clip_cov.low=0.01"]
        chosen, together, _ = step_gradient(ALONE, rewards_of=by_length, strategy="scope", more=more)
        _, alone, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none", more=more)
        return chosen, {name: together[name] - alone[name] for name in together}, alone

    chosen, difference, alone = penalty(objective)
    expected_chosen, expected, grpo_alone = penalty("grpo")
    assert (chosen == expected_chosen).all() and chosen.any()
    assert_same_gradient(expected, difference, tolerance=1e-5)
    if objective not in ("grpo", "kl_cov"):  # and the objectives do differ
        with pytest.raises(AssertionError):
            assert_same_gradient(grpo_alone, alone, tolerance=1e-4)


CASES = [(objective, normaliser, on_policy, ()) for objective in grpo.OBJECTIVES for normaliser in ("token", "sequence")
         for on_policy in (True, False)]  # fmt: skip
CASES += [("grpo", "token", False, ("selection.kl=k3",)),
          ("grpo", "token", True, ("selection.kl=k3", "grpo.kl_coef=0.3")),
          ("forking_rl", "sequence", False, ("grpo.kl_coef=0.3", "grpo.entropy_coef=0.2"))]  # fmt: skip


@pytest.mark.parametrize("objective, normaliser, on_policy, extra", CASES)
def test_from_config_words_to_gradient(objective, normaliser, on_policy, extra):
    """The whole of steps 5-6 against loops over float64 logits: marks, weights, ratios, penalty, regularisers."""
    words = ["selection.kl_coef=0.7", "selection.fraction=0.2", f"objective={objective}", "div.coef=0.4",
             "kl_cov.coef=2.0", f"grpo.normaliser={normaliser}", "kl_cov.fraction=0.1", "clip_cov.fraction=0.2",
             "clip_cov.low=0.05", "grpo.clip_low=0.05", "grpo.clip_high=0.1", *extra]  # fmt: skip
    _, gradient, figures = step_gradient(ALONE, rewards_of=by_length, more=words, on_policy=on_policy)
    config = config_of(*words)

    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 40, (3 + i % 4,), generator=generator).tolist() for i in range(8)]
    prompts = [prompts[row // 4] for row in range(32)]
    sampled = rollout.sample(tiny_model(seed=0), prompts, list(range(32)), stop=[1, 5], max_new_tokens=16,
                             temperature=0.9, seed=0, step=0)  # fmt: skip
    advantages = grpo.group_advantages(by_length(sampled, range(32)), 4).tolist()
    policy = tiny_model(seed=0) if on_policy else moved(tiny_model(seed=0))
    policy, reference = policy.double(), tiny_model(seed=1).double()

    tokens = []  # one dictionary a token, in row order
    for b, prompt in enumerate(prompts):
        completion = sampled.tokens[b][sampled.mask[b]].tolist()
        ids = torch.tensor([prompt + completion])
        logp = torch.log_softmax(policy(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        with torch.no_grad():
            log_ref = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        for t, y in enumerate(completion):
            p = logp[t].exp()
            now = logp[t, y].item()
            tokens.append({
                "b": b, "A": advantages[b], "T": len(completion), "logp": logp[t, y], "ref": log_ref[t, y],
                "old": now if on_policy else sampled.logprobs[b, t].item(), "H": -(p * logp[t]).sum(),
                "D": (p * (logp[t] - log_ref[t])).sum(),
                "s": math.exp(now) * (1 - math.exp(now)) * max(advantages[b], 0),
            })  # fmt: skip
    N = len(tokens)
    mean_logp, mean_A = mean([t["logp"].item() for t in tokens]), mean([t["A"] for t in tokens])

    def largest(score, k):
        return sorted(range(N), key=lambda i: -score(tokens[i]))[:k]

    marked = set()
    if objective == "forking_rl":
        marked = set(largest(lambda t: t["H"].item(), round(0.2 * N)))
    if objective == "kl_cov":
        marked = set(largest(lambda t: (t["logp"].item() - mean_logp) * (t["A"] - mean_A), round(0.1 * N)))
    if objective == "clip_cov":  # drawn at random: the draw is taken over, its rule is tested above
        C = torch.tensor([(t["logp"].item() - mean_logp) * (t["A"] - mean_A) for t in tokens])
        rho = torch.tensor([math.exp(t["logp"].item() - t["old"]) for t in tokens])
        A = torch.tensor([t["A"] for t in tokens])
        out = ((A > 0) & (rho > 2)) | ((A < 0) & (rho < 0))
        drawn = grpo.clip_cov_tokens(C, out, fraction=0.2, low=0.05, high=5.0, seed=0x9E3779B9)
        marked = set(drawn.nonzero().flatten().tolist())
        assert marked

    kept = marked if objective == "forking_rl" else set(range(N))
    loss = 0.0
    for i, t in enumerate(tokens):
        rho = (t["logp"] - t["old"]).exp()
        low, high = (0.0, 2.0) if objective == "clip_cov" else (0.95, 1.1)
        value = -torch.minimum(rho * t["A"], rho.clamp(low, high) * t["A"])
        if objective == "kl_cov":
            value = -rho * t["A"] + (2.0 * (t["logp"] - t["old"]).abs() if i in marked else 0.0)
        if i not in kept or (objective == "clip_cov" and i in marked):
            value = value * 0
        in_row = sum(1 for j in kept if tokens[j]["b"] == t["b"])
        loss = loss + value / (len(kept) if normaliser == "token" else 32 * max(in_row, 1))
        if objective == "div" and t["b"] % 3 == 0:  # the rows that gradient_worker calls correct
            loss = loss + 0.4 * rho * t["logp"] / (t["T"] * 32)
        d = t["ref"] - t["logp"]
        loss = loss + (config.grpo.kl_coef * (d.exp() - d - 1) - config.grpo.entropy_coef * t["H"]) / N
    chosen = [i for i in largest(lambda t: t["s"], round(0.2 * N)) if tokens[i]["s"] > 0]
    for i in chosen:
        d = tokens[i]["ref"] - tokens[i]["logp"]
        loss = loss + 0.7 * (d.exp() - d - 1 if config.selection.kl == "k3" else tokens[i]["D"]) / len(chosen)
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert_same_gradient({name: p.grad for name, p in policy.named_parameters()}, gradient, tolerance=2e-4)


def test_clip_covs_draw_is_not_the_selections():
    """The same candidates and seed: the two draws overlap as chance has it, not token for token."""
    known = {name: torch.zeros(2000) for name in ("logprobs", "entropy", "advantages")}
    flat = known | {"old_logprobs": torch.zeros(2000), "selected": torch.zeros(2000)}
    config = config_of("clip_cov.low=0.0", "clip_cov.fraction=0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scope, "covariance_score", lambda logprobs, advantages: torch.ones(2000))
        marked = steps.clip_cov_marks(flat, {"seed": 5}, config)
    uniform = scope.select_tokens("uniform", fraction=0.1, seed=5, **known)
    assert marked.sum() == uniform.sum() == 200 and (marked & uniform).sum() < 50  # 20 expected


def test_cov_methods_mark_at_least_one_token():
    flat = {name: torch.randn(50, generator=torch.Generator().manual_seed(i))
            for i, name in enumerate(("logprobs", "entropy", "advantages"))}  # fmt: skip
    arguments = flat | {"seed": 0, "collision": None, "forking_fraction": 0.2}
    flat = flat | {"selected": torch.zeros(50), "old_logprobs": flat["logprobs"]}
    for name in ("kl_cov", "clip_cov"):
        marks = steps.MARKS[name](flat, arguments, config_of("clip_cov.low=0.0"))
        assert marks.sum() == 1, name


def test_later_updates_select_by_the_policy_as_it_is_then(in_tmp, monkeypatch):
    """train.py itself, two updates a step: fresh log-probabilities in the second, a fresh draw in each."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: "1" in text)
    select, seen = steps.select, []

    def spy(current, old_logprobs, advantages, config, seed):
        seen.append(((current.logprobs - old_logprobs).abs().max().item(), seed, len(advantages)))
        return select(current, old_logprobs, advantages, config, seed)

    monkeypatch.setattr(steps, "select", spy)
    words = ["steps=3", "grpo.updates_per_rollout=2", "name=two", "reward=token_entropy"]
    train.main(configs.training_keys([*SMALL, *words]))
    moved_by, seeds, rows = zip(*seen)
    assert len(set(seeds)) == 6 and set(rows) == {8}  # 4 problems x 4 completions in two parts
    assert all(m == 0 for m in moved_by[::2]) and all(m > 1e-4 for m in moved_by[1::2])


# ---------------------------------------------------------------- rewards


def record(values, lengths):
    """[B, C] with zeros past each row's length, and its mask."""
    width = max(lengths)
    padded = torch.tensor([row + [0.0] * (width - len(row)) for row in values])
    mask = torch.tensor([[t < length for t in range(width)] for length in lengths])
    return padded, mask


def test_rewards_by_loops():
    lengths = [3, 1, 5]
    generator = torch.Generator().manual_seed(0)
    rows = {name: [torch.rand(n, generator=generator).tolist() for n in lengths]
            for name in ("logprobs", "entropy", "self_certainty")}  # fmt: skip
    padded = {name: record(values, lengths)[0] for name, values in rows.items()}
    sampled = SimpleNamespace(mask=record(rows["entropy"], lengths)[1], **padded)
    correct = torch.tensor([True, False, True])
    expected = {
        "accuracy": [1.0, 0.0, 1.0],
        "self_certainty": [sum(row) / len(row) for row in rows["self_certainty"]],
        "token_entropy": [-sum(row) / len(row) for row in rows["entropy"]],
        "trajectory_likelihood": [sum(row) for row in rows["logprobs"]],
        "trajectory_entropy": [-sum(row) for row in rows["entropy"]],
    }
    assert expected.keys() == rewards.REWARDS.keys()
    for name, values in expected.items():
        assert rewards.REWARDS[name](correct, sampled).tolist() == pytest.approx(values, rel=1e-6), name


def test_self_certainty_is_aligned_with_the_drawn_tokens():
    """A three-token completion: the distributions *before* each token count, the one after the last does not."""
    model = tiny_model()
    sampled = rollout.sample(model, [[7, 3, 9]], [0], stop=[1], max_new_tokens=3, seed=0, step=0)
    completion = sampled.tokens[0].tolist()
    total = 0.0
    for t in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([[7, 3, 9] + completion[:t]])).logits[0, -1].double().tolist()
        log_z = math.log(sum(math.exp(z) for z in logits))
        total += sum((1 / 40) * (math.log(1 / 40) - (z - log_z)) for z in logits)
    reward = rewards.self_certainty(torch.tensor([False]), sampled)
    assert sampled.mask.sum() == 3 and reward.item() == pytest.approx(total / 3, rel=1e-4)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("reward", [name for name in rewards.REWARDS if name != "accuracy"])
def test_rlif_uses_no_labels(in_tmp, monkeypatch, reward):
    """Other answers, the same training to the last bit; only the logged accuracy differs."""
    rows, weights = {}, {}
    for name, parity in (("right", 0), ("shuffled", 1)):  # labels that vary within a group
        monkeypatch.setattr(
            data, "is_correct", lambda _, text, grader, side=parity: zlib.crc32(text.encode()) % 2 == side)
        # Long enough for a good share of the random model's completions to stop: truncated ones count as wrong.
        train.main(configs.training_keys([*SMALL, "steps=2", "max_new_tokens=60", f"reward={reward}", f"name={name}"]))
        rows[name] = metrics_of(name)
        weights[name] = rollout.load(f"runs/{name}/model")[0].state_dict()
    for key, weight in weights["right"].items():
        assert torch.equal(weight, weights["shuffled"][key])
    for right, shuffled in zip(rows["right"], rows["shuffled"], strict=True):
        prefixes = ("eval/acc", "eval/pass", "eval/majority", "reward/accuracy")
        labelled = {key for key in right if key.startswith(prefixes)}
        assert {key: value for key, value in right.items() if key not in labelled} == {
            key: value for key, value in shuffled.items() if key not in labelled
        }
    labels = [[row.get("reward/accuracy", row.get("eval/pass@1")) for row in rows[name]] for name in rows]
    assert labels[0] != labels[1]
    assert rows["right"][-2]["kl/selected"] > 0  # it did train


# ---------------------------------------------------------------- all together


def test_rescored_record_is_the_current_policys():
    policy, config = tiny_model(), config_of("temperature=0.8", "micro_batch_size=3", "logits_chunk=4")
    sampled = rollout.sample(policy, [[2, 3], [4]] * 4, list(range(8)), stop=[1], max_new_tokens=9, temperature=0.8,
                             seed=0, step=0, collision=True)  # fmt: skip
    assert sampled.collision.abs().max() > 0.01
    same = steps.rescore(policy, sampled, config, ALONE)
    for name in ("logprobs", "entropy", "collision"):
        torch.testing.assert_close(getattr(same, name), getattr(sampled, name), rtol=0, atol=1e-5)
    other = steps.rescore(tiny_model(seed=5), sampled, config, ALONE)
    assert (other.logprobs - sampled.logprobs).abs().max() > 0.1
    assert (other.tokens == sampled.tokens).all() and (other.self_certainty == sampled.self_certainty).all()


TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, spread=0.5)


def two_steps(config, reference):
    """Two steps of two updates each, as train.py puts them together; yields the figures of every update."""
    tokenizer, problems = toy.make_tokenizer(29), [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]
    policy = tiny_model(**TINY)
    objective = steps.Objective(policy, config, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        sampled, _, rewarded, correct = steps.roll_out(policy, tokenizer, [1], problems, step, config, ALONE)
        advantages = grpo.group_advantages(rewarded, 2)
        for rows in (slice(0, 4), slice(4, 8)):
            own, on_policy = sampled[rows], rows.start == 0
            current = own if on_policy else steps.rescore(policy, own, config, ALONE)
            selection = steps.select(current, own.logprobs, advantages[rows], config, seed=step)
            batches = steps.micro_batches(own, advantages[rows], correct[rows], selection, reference, config, ALONE)
            figures = steps.update(objective, optimizer, batches, selection, on_policy=on_policy, world=ALONE,
                                   max_grad_norm=1.0)  # fmt: skip
            yield figures | steps.selection_metrics(selection.flat, config)
    before = tiny_model(**TINY).get_input_embeddings().weight
    assert not torch.equal(policy.get_input_embeddings().weight, before)


@pytest.mark.parametrize("objective", grpo.OBJECTIVES)
def test_every_combination_trains(monkeypatch, objective):
    """objective x strategy x reward: two steps on a tiny random model, finite throughout, and the weights move."""
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: len(text) % 3 == 0)
    reference = tiny_model(**TINY)
    for strategy in scope.STRATEGIES:
        for reward in rewards.REWARDS if objective != "div" else ["accuracy"]:
            config = config_of(
                f"objective={objective}", f"selection.strategy={strategy}", f"reward={reward}", "prompts_per_step=4",
                "group_size=2", "max_new_tokens=4", "clip_cov.low=0.01", "clip_cov.fraction=0.2", "kl_cov.fraction=0.2",
                "grpo.updates_per_rollout=2",
            )  # fmt: skip
            for figures in two_steps(config, reference):
                assert all(math.isfinite(value) for value in figures.values()), (objective, strategy, reward)


def test_kl_cov_with_one_update_says_so(in_tmp, capsys):
    train.main(configs.training_keys([*SMALL, "steps=1", "objective=kl_cov", "name=one"]))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "grpo.updates_per_rollout=2" in notes[0]
    train.main(configs.training_keys([*SMALL, "steps=1", "objective=kl_cov", "grpo.updates_per_rollout=2", "name=two"]))
    assert "note:" not in capsys.readouterr().err
