"""Objectives against float64 loops written from their papers: value, gradient, and the whole way from config words."""

import math

import pytest
import torch
from gradient_worker import by_length, moved, step_gradient
from helpers import ALONE, assert_same_gradient, config_of, tiny_model

import grpo
import rollout
import scope
import step as steps


def mean(values):
    return sum(values) / len(values)


B, COEF, LOW, HIGH = 6, 0.3, 0.2, 0.28


@pytest.fixture
def constants(monkeypatch):
    """Sets grpo's constants of the rival objectives: so few tokens see the papers' own values."""
    def put(**values):
        for name, value in values.items():
            monkeypatch.setattr(grpo, name, value)
    return put


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
        })
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
    )
    low, high = grpo.OBJECTIVES[objective].clip or (LOW, HIGH)
    return grpo.OBJECTIVES[objective].loss(tokens, clip_low=low, clip_high=high)


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
@pytest.mark.parametrize("objective", grpo.OBJECTIVES)
def test_objectives_value_and_gradient(completions, constants, objective, normaliser):
    constants(DIV_COEF=COEF, KL_COV_COEF=COEF)
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


def test_kl_cov_on_policy_is_grpo(constants):
    """One update per rollout: the penalty's subgradient is 0 at equality, so its words change nothing."""
    constants(KL_COV_COEF=50.0, KL_COV_FRACTION=0.5)
    _, plain, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none")
    _, with_cov, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none",
                                   more=["objective=kl_cov"])
    assert_same_gradient(plain, with_cov, tolerance=1e-7)


def test_marked_tokens_of_each_objective(constants):
    """forking_rl marks the forking tokens, kl_cov the highest covariances, in the step itself."""
    constants(KL_COV_FRACTION=0.1, CLIP_COV_FRACTION=0.1, CLIP_COV_LOW=0.1)
    marks = {}
    for objective in ("grpo", "div", "forking_rl", "kl_cov", "clip_cov"):
        config = config_of(f"objective={objective}")
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
def test_scope_leaves_the_objectives_own_gradient_untouched(constants, objective):
    """(objective + SCOPE) - objective is one and the same vector for every objective: the penalty's gradient."""
    constants(DIV_COEF=0.5, CLIP_COV_FRACTION=0.2, CLIP_COV_LOW=0.01)

    def penalty(objective):
        more = [f"objective={objective}"]
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


CASES = [(objective, normaliser, on_policy, ()) for objective in grpo.OBJECTIVES
         for normaliser, on_policy in (("token", True), ("token", False), ("sequence", False))]
CASES += [("grpo", "token", True, ("selection.normaliser=tokens",))]


@pytest.mark.parametrize("objective, normaliser, on_policy, extra", CASES)
def test_from_config_words_to_gradient(constants, objective, normaliser, on_policy, extra):
    """The whole of steps 5-6 against loops over float64 logits: marks, weights, ratios, penalty."""
    constants(DIV_COEF=0.4, KL_COV_COEF=2.0, KL_COV_FRACTION=0.1, CLIP_COV_FRACTION=0.2, CLIP_COV_LOW=0.05)
    words = ["selection.kl_coef=0.7", "selection.fraction=0.2", f"objective={objective}",
             f"grpo.normaliser={normaliser}", "grpo.clip_low=0.05", "grpo.clip_high=0.1", *extra]
    _, gradient, metrics = step_gradient(ALONE, rewards_of=by_length, more=words, on_policy=on_policy,
                                         micro_batch_size=12, logits_chunk=50)
    config = config_of(*words)

    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 40, (3 + i % 4,), generator=generator).tolist() for i in range(8)]
    prompts = [prompts[row // 4] for row in range(32)]
    sampled = rollout.sample(tiny_model(seed=0), prompts, list(range(32)), stop=[1, 5], max_new_tokens=16,
                             temperature=0.9, seed=0, step=0)
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
                "b": b, "A": advantages[b], "T": len(completion), "logp": logp[t, y],
                "old": now if on_policy else sampled.logprobs[b, t].item(), "H": -(p * logp[t]).sum(),
                "D": (p * (logp[t] - log_ref[t])).sum(),
                "s": math.exp(now) * (1 - math.exp(now)) * max(advantages[b], 0),
            })
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
    chosen = [i for i in largest(lambda t: t["s"], round(0.2 * N)) if tokens[i]["s"] > 0]
    paying = N if config.selection.normaliser == "tokens" else len(chosen)
    for i in chosen:
        loss = loss + 0.7 * tokens[i]["D"] / paying
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert_same_gradient({name: p.grad for name, p in policy.named_parameters()}, gradient, tolerance=2e-4)


def test_clip_covs_draw_is_not_the_selections(constants):
    """The same candidates and seed: the two draws overlap as chance has it, not token for token."""
    constants(CLIP_COV_LOW=0.0, CLIP_COV_FRACTION=0.1)
    known = {name: torch.zeros(2000) for name in ("logprobs", "entropy", "advantages")}
    flat = known | {"old_logprobs": torch.zeros(2000), "selected": torch.zeros(2000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "covariance_score", lambda logprobs, advantages: torch.ones(2000))
        marked = grpo.OBJECTIVES["clip_cov"].marks(flat, config_of(), 5)
    uniform = scope.select_tokens("uniform", fraction=0.1, seed=5, **known)
    assert marked.sum() == uniform.sum() == 200 and (marked & uniform).sum() < 50  # 20 expected


def test_cov_methods_mark_at_least_one_token(constants):
    constants(CLIP_COV_LOW=0.0)
    flat = {name: torch.randn(50, generator=torch.Generator().manual_seed(i))
            for i, name in enumerate(("logprobs", "entropy", "advantages"))}
    flat["old_logprobs"] = flat["logprobs"]
    for name in ("kl_cov", "clip_cov"):
        marks = grpo.OBJECTIVES[name].marks(flat, config_of(), 0)
        assert marks.sum() == 1, name
