"""Objectives against float64 loops written from their papers, alone and from settings."""

import math

import pytest
import torch
from gradient_worker import by_length, made_up_prompts, made_up_rollout, moved, step_gradient
from helpers import ALONE, assert_same_gradient, config_of, tiny_model

from grpo import group_advantages
from objectives import OBJECTIVES, MicroBatch
from rollout import sample
from scope import covariance_score, select_tokens
from train import select

B = 6
LOW = 0.2
HIGH = 0.28


def mean(values):
    return sum(values) / len(values)


@pytest.fixture
def strong(monkeypatch):
    """Give the constants of the papers values that show in small batches."""
    constants = {
        "DIV_COEF": 0.4,
        "KL_COV_COEF": 2.0,
        "KL_COV_FRACTION": 0.1,
        "CLIP_COV_FRACTION": 0.2,
        "CLIP_COV_RANGE": (0.05, 5.0),
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"objectives.{name}", value)


# ---------------------------------------------------------------- losses


@pytest.fixture
def completions():
    """Make up six completions of unequal length, off-policy, as a list of tokens for each."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for b in range(B):
        A = torch.randn(1, generator=generator).item()
        row = []
        for _ in range(3 + 2 * b):
            old, noise, chance = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            row.append(
                {
                    "logp": -2 * old + noise - 0.5,
                    "old": -2 * old,
                    "A": A,
                    "correct": b % 2 == 0,
                    "marked": chance < 0.3,
                }
            )
        rows.append(row)
    return rows


def slow_ppo(token, low, high):
    rho = math.exp(token["logp"] - token["old"])
    return -min(rho * token["A"], min(max(rho, 1 - low), 1 + high) * token["A"])


def slow_token_loss(token, objective):
    if objective == "kl_cov":
        drift = token["logp"] - token["old"]
        penalty = 2.0 * abs(drift) if token["marked"] else 0.0
        return penalty - math.exp(drift) * token["A"]
    if objective == "clip_cov":
        return 0.0 if token["marked"] else slow_ppo(token, 1.0, 1.0)
    return slow_ppo(token, LOW, HIGH)


def slow_objective(rows, objective, normaliser):
    """Compute the loss as the papers write it: per token, then a mean over tokens, or over
    completions of their means.
    """
    losses = []  # of each completion: those of the tokens that count
    for row in rows:
        counted = [token for token in row if token["marked"] or objective != "forking_rl"]
        losses.append([slow_token_loss(token, objective) for token in counted])
    if normaliser == "token":
        loss = sum(map(sum, losses)) / sum(map(len, losses))
    else:
        loss = sum(sum(of_row) / max(len(of_row), 1) for of_row in losses) / B
    if objective == "div":
        for row in rows:
            if row[0]["correct"]:
                terms = [math.exp(token["logp"] - token["old"]) * token["logp"] for token in row]
                loss += 0.4 * mean(terms) / B
    return loss


def fast_objective(rows, objective, normaliser, logprobs):
    """Compute the same by OBJECTIVES, with the weights that train.update makes."""
    tokens = sum(rows, [])

    def column(name, dtype=torch.float64):
        return torch.tensor([token[name] for token in tokens], dtype=dtype)

    counts = torch.tensor([len(row) for row in rows])
    counted = counts
    if objective == "forking_rl":
        counted = torch.tensor([sum(token["marked"] for token in row) for row in rows])
    weight = 1 / (counted.clamp(min=1) * B).double()
    if normaliser == "token":
        weight = torch.full((B,), 1 / int(counted.sum()), dtype=torch.float64)
    batch = MicroBatch(
        rows=None,
        tokens=None,
        predicts_completion=None,
        targets=None,
        selected=None,
        old_logprobs=column("old"),
        advantages=column("A"),
        correct=column("correct", torch.bool),
        token_mask=column("marked", torch.bool),
        weight=weight.repeat_interleave(counts),
        sequence_weight=(1 / (counts * B).double()).repeat_interleave(counts),
    )
    clip = OBJECTIVES[objective].clip or (LOW, HIGH)
    old = batch.old_logprobs.requires_grad_()
    loss = OBJECTIVES[objective].loss(logprobs, old, batch, *clip).sum()
    assert torch.autograd.grad(loss, old, allow_unused=True, retain_graph=True) == (None,)
    return loss


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_value_and_gradient(strong, completions, objective, normaliser):
    tokens = sum(completions, [])
    logprobs = torch.tensor(
        [token["logp"] for token in tokens], dtype=torch.float64, requires_grad=True
    )
    loss = fast_objective(completions, objective, normaliser, logprobs)
    loss.backward()
    expected = slow_objective(completions, objective, normaliser)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    h = 1e-6
    for token, gradient in zip(tokens, logprobs.grad.tolist(), strict=True):
        logp = token["logp"]
        token["logp"] = logp + h
        up = slow_objective(completions, objective, normaliser)
        token["logp"] = logp - h
        down = slow_objective(completions, objective, normaliser)
        token["logp"] = logp
        assert gradient == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-9)


# ---------------------------------------------------------------- the tokens that they mark


def test_clip_cov_marks_tokens_in_its_range_that_are_not_clipped(monkeypatch):
    """Only 1 < C < 5, and rho <= 2 where A > 0; round(fraction N) at random, or all if fewer."""
    covariance = torch.linspace(-2, 8, 1001)
    monkeypatch.setattr("objectives.covariance_score", lambda logprobs, advantages: covariance)
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 0.05)
    logprobs = torch.full((1001,), -1.0)
    clipped = torch.arange(1001) % 3 == 0
    tokens = {
        "logprobs": logprobs,
        "advantages": torch.ones(1001),
        "old_logprobs": logprobs - clipped.float(),
    }
    candidates = {i for i in range(1001) if 1 < covariance[i] < 5 and i % 3}
    seen = set()
    for seed in range(60):
        mask = OBJECTIVES["clip_cov"].token_mask(tokens, config_of(), seed)
        marked = set(mask.nonzero().flatten().tolist())
        assert len(marked) == 50
        assert marked <= candidates
        seen |= marked
    assert len(seen) > 0.99 * len(candidates)
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 1.0)
    everything = OBJECTIVES["clip_cov"].token_mask(tokens, config_of(), 0)
    assert set(everything.nonzero().flatten().tolist()) == candidates


def test_clip_cov_draws_other_tokens_than_the_selection(monkeypatch):
    """With the same candidates and seed the two overlap as chance has it, not token for token."""
    tokens = {name: torch.zeros(2000) for name in ("logprobs", "entropy", "advantages")}
    monkeypatch.setattr(
        "objectives.covariance_score", lambda logprobs, advantages: torch.full((2000,), 2.0)
    )
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 0.1)
    mask = OBJECTIVES["clip_cov"].token_mask(
        tokens | {"old_logprobs": torch.zeros(2000)}, config_of(), 5
    )
    uniform = select_tokens("uniform", fraction=0.1, seed=5, **tokens)
    assert mask.sum() == uniform.sum() == 200
    assert (mask & uniform).sum() < 50  # 20 expected


@pytest.mark.parametrize("objective", ["kl_cov", "clip_cov"])
def test_cov_methods_mark_at_least_one_token(monkeypatch, objective):
    monkeypatch.setattr("objectives.CLIP_COV_RANGE", (0.0, 5.0))
    tokens = {}
    for seed, name in enumerate(("logprobs", "entropy", "advantages")):
        tokens[name] = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    tokens["old_logprobs"] = tokens["logprobs"]
    assert OBJECTIVES[objective].token_mask(tokens, config_of(), 0).sum() == 1


def test_token_masks_in_a_step(strong):
    """forking_rl marks the forking tokens, kl_cov the highest covariances."""
    prompts = [[2, 3 + i] for i in range(16)]  # all different: no two tokens share a distribution
    rollout = sample(
        tiny_model(), prompts, list(range(16)), stop=[1], max_new_tokens=9, seed=0, step=0
    )
    rollout.advantages = group_advantages(torch.arange(16.0) % 5, 8)
    masks = {}
    for objective in OBJECTIVES:
        config = config_of(f"objective={objective}", "forking_fraction=0.3")
        _, mask, metrics = select(rollout, rollout, config, ALONE, seed=0)
        masks[objective] = mask[rollout.mask]
        assert not mask[~rollout.mask].any()
        assert metrics["objective/fraction"] == pytest.approx(
            masks[objective].float().mean().item()
        )
    logprobs = rollout.logprobs[rollout.mask]
    entropy = rollout.entropy[rollout.mask]
    advantages = rollout.advantages[:, None].expand_as(rollout.mask)[rollout.mask]
    n = len(entropy)
    assert not masks["grpo"].any()
    assert not masks["div"].any()
    assert (masks["forking_rl"] == (entropy >= entropy.sort().values[-round(0.3 * n)])).all()
    covariance = covariance_score(logprobs, advantages)
    assert (masks["kl_cov"] == (covariance >= covariance.sort().values[-round(0.1 * n)])).all()
    assert 0 < masks["clip_cov"].sum() <= round(0.2 * n)
    assert (covariance[masks["clip_cov"]] > 0.05).all()


# ---------------------------------------------------------------- gradients of a whole update


def test_kl_cov_on_policy_is_grpo(strong):
    """With one update per rollout the penalty's subgradient is 0."""
    _, grpo, _ = step_gradient(ALONE, rewards_of=by_length, strategy="none")
    _, kl_cov, _ = step_gradient(ALONE, "objective=kl_cov", rewards_of=by_length, strategy="none")
    assert_same_gradient(grpo, kl_cov, tolerance=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scope_leaves_the_objectives_own_gradient_untouched(strong, objective):
    """(objective + SCOPE) - objective is the same vector for all: the penalty's gradient."""

    def gradients_of(objective):
        setting = f"objective={objective}"
        selected, together, _ = step_gradient(ALONE, setting, rewards_of=by_length)
        _, alone, _ = step_gradient(ALONE, setting, rewards_of=by_length, strategy="none")
        return selected, alone, {name: together[name] - alone[name] for name in together}

    selected, alone, penalty = gradients_of(objective)
    expected_selected, grpo, expected = gradients_of("grpo")
    assert selected.any()
    assert (selected == expected_selected).all()
    assert_same_gradient(expected, penalty, tolerance=1e-5)
    if objective not in ("grpo", "kl_cov"):  # and the objectives do differ
        with pytest.raises(AssertionError):
            assert_same_gradient(grpo, alone, tolerance=1e-4)


def slow_step_tokens(rollout, policy, reference, on_policy):
    """Return every token of the step, a dictionary each, from float64 logits one row at a time."""
    tokens = []
    for b, prompt in enumerate(rollout.prompts):
        completion = rollout.tokens[b][rollout.mask[b]].tolist()
        ids = torch.tensor([prompt + completion])
        logp = torch.log_softmax(policy(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        with torch.no_grad():
            log_ref = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
        for t, y in enumerate(completion):
            p = logp[t].exp()
            now = logp[t, y].item()
            A = rollout.advantages[b].item()
            tokens.append(
                {
                    "row": b,
                    "length": len(completion),
                    "A": A,
                    "logp": logp[t, y],
                    "old": now if on_policy else rollout.logprobs[b, t].item(),
                    "H": -(p * logp[t]).sum().item(),
                    "D": (p * (logp[t] - log_ref[t])).sum(),
                    "s": math.exp(now) * (1 - math.exp(now)) * max(A, 0),
                }
            )
    return tokens


def largest(scores, k):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def slow_marks(tokens, objective):
    """Return the numbers of the tokens that the objective treats specially."""
    N = len(tokens)
    logprobs = [token["logp"].item() for token in tokens]
    advantages = [token["A"] for token in tokens]
    mean_logp = mean(logprobs)
    mean_A = mean(advantages)
    if objective == "forking_rl":
        return largest([token["H"] for token in tokens], round(0.3 * N))
    if objective == "kl_cov":
        scores = [(x - mean_logp) * (A - mean_A) for x, A in zip(logprobs, advantages)]
        return largest(scores, round(0.1 * N))
    if objective == "clip_cov":  # these are drawn at random: the draw is taken over, tested above
        old = torch.tensor([token["old"] for token in tokens])
        columns = {
            "logprobs": torch.tensor(logprobs),
            "advantages": torch.tensor(advantages),
            "old_logprobs": old,
        }
        return OBJECTIVES[objective].token_mask(columns, None, 0).nonzero().flatten().tolist()
    return []


@pytest.mark.parametrize(
    "normaliser, on_policy", [("token", True), ("token", False), ("sequence", False)]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_from_settings_to_gradient(strong, objective, normaliser, on_policy):
    """Steps 5-6 as a whole against loops over float64 logits: marks, weights, ratios, penalty."""
    _, gradient, metrics = step_gradient(
        ALONE,
        f"objective={objective}",
        f"grpo.normaliser={normaliser}",
        "grpo.clip_low=0.05",
        "grpo.clip_high=0.1",
        "forking_fraction=0.3",
        "micro_batch_size=12",
        "logits_chunk=50",
        rewards_of=by_length,
        on_policy=on_policy,
    )
    rollout = made_up_rollout(tiny_model(seed=0), list(range(32)), by_length)
    assert rollout.prompts == made_up_prompts()
    policy = tiny_model(seed=0)
    if not on_policy:
        policy = moved(policy)
    policy.double()
    tokens = slow_step_tokens(rollout, policy, tiny_model(seed=1).double(), on_policy)
    N = len(tokens)
    marked = set(slow_marks(tokens, objective))
    counted = set(range(N))
    if objective == "forking_rl":
        counted = marked
    low, high = {"clip_cov": (0.0, 2.0), "kl_cov": (0.0, math.inf)}.get(objective, (0.95, 1.1))
    loss = 0.0
    num_clipped = 0
    for i, token in enumerate(tokens):
        A = token["A"]
        rho = (token["logp"] - token["old"]).exp()
        num_clipped += bool((A > 0 and rho > high) or (A < 0 and rho < low))
        value = -torch.minimum(rho * A, rho.clamp(low, high) * A)
        if objective == "kl_cov" and i in marked:
            value = value + 2.0 * (token["logp"] - token["old"]).abs()
        if i not in counted or (objective == "clip_cov" and i in marked):
            value = value * 0
        denominator = len(counted)
        if normaliser == "sequence":
            denominator = 32 * max(sum(tokens[j]["row"] == token["row"] for j in counted), 1)
        loss = loss + value / denominator
        if (
            objective == "div" and token["row"] % 3 == 0
        ):  # the rows that made_up_rollout calls correct
            loss = loss + 0.4 * rho * token["logp"] / (token["length"] * 32)
    selected = [
        i for i in largest([token["s"] for token in tokens], round(0.2 * N)) if tokens[i]["s"] > 0
    ]
    penalty = sum(tokens[i]["D"] for i in selected)
    loss = loss + 0.7 * penalty / len(selected)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert metrics["kl/selected"] == pytest.approx(penalty.item() / len(selected), rel=1e-3)
    assert metrics["clip_frac"] == pytest.approx(num_clipped / N, abs=1e-6)
    assert on_policy or objective in ("kl_cov", "clip_cov") or num_clipped > 0
    expected = {name: p.grad for name, p in policy.named_parameters()}
    assert_same_gradient(expected, gradient, tolerance=2e-4)
