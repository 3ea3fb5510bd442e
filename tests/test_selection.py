"""Selection strategies and KL estimates against float64 loops written from their formulas."""

import math

import pytest
import torch
from torch.testing import assert_close

import scope

N = 400
TOKENS_WITHOUT_ADVANTAGE = {
    "logprobs": torch.linspace(-3, -0.1, N),
    "entropy": torch.linspace(0, 1, N),
    "advantages": torch.zeros(N),
}


@pytest.fixture(scope="module")
def rows():
    """Make up a step, a dictionary a token: 5-token distributions, one sampled token each,
    advantages of both signs and some zeros.
    """
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(N, 5, generator=generator, dtype=torch.float64), dim=1)
    y = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    advantages = torch.randn(N, generator=generator, dtype=torch.float64).round(decimals=1)
    advantages[::7] = 0
    rows = []
    for i in range(N):
        distribution = probs[i].tolist()
        H = -sum(p * math.log(p) for p in distribution)
        rows.append(
            {
                "distribution": distribution,
                "p": distribution[y[i]],
                "logprobs": math.log(distribution[y[i]]),
                "entropy": H,
                "advantages": advantages[i].item(),
                "entropy_baseline": sum(p * p * (math.log(p) + H) for p in distribution),
                "alpha_minus_beta": math.sin(i),
            }
        )
    return rows


def selected_of(rows, strategy, *, seed=0, fraction=0.05, forking_fraction=0.2):
    columns = {}
    for name in ("logprobs", "entropy", "advantages", "entropy_baseline", "alpha_minus_beta"):
        columns[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    mask = scope.select_tokens(
        strategy, fraction=fraction, seed=seed, forking_fraction=forking_fraction, **columns
    )
    return set(mask.nonzero().flatten().tolist())


# ---------------------------------------------------------------- selections


def forking_set(rows, fraction=0.2):
    ranked = sorted(range(N), key=lambda i: -rows[i]["entropy"])
    return set(ranked[: round(fraction * N)])


def positive_set(rows):
    return {i for i in range(N) if rows[i]["advantages"] > 0}


RANDOM = {  # strategy: candidates by definition
    "uniform": lambda rows: set(range(N)),
    "positive": positive_set,
    "forking": forking_set,
    "forking_positive": lambda rows: forking_set(rows) & positive_set(rows),
    "non_forking": lambda rows: set(range(N)) - forking_set(rows),
}


@pytest.mark.parametrize("strategy", RANDOM)
def test_random_strategies_draw_from_their_candidates(rows, strategy):
    """K without replacement, every candidate alike and no other; another seed, another draw."""
    candidates = RANDOM[strategy](rows)
    counts = dict.fromkeys(range(N), 0)
    draws = 300
    for seed in range(draws):
        selected = selected_of(rows, strategy, seed=seed)
        assert len(selected) == 20
        assert selected <= candidates
        for i in selected:
            counts[i] += 1
    rate = 20 / len(candidates)
    error = math.sqrt(draws * rate * (1 - rate))
    deviations = [(counts[i] - draws * rate) / error for i in candidates]
    assert max(map(abs, deviations)) < 4.5
    assert (
        sum(d * d for d in deviations) / len(deviations) < 1.5
    )  # the variance of a fair draw is 1


def test_a_small_candidate_set_is_taken_whole(rows):
    expected = forking_set(rows, 0.02) & positive_set(rows)
    assert 0 < len(expected) < 20
    assert selected_of(rows, "forking_positive", forking_fraction=0.02) == expected


def slow_score(strategy, row, mean_logp, mean_A):
    p = row["p"]
    A = row["advantages"]
    H = row["entropy"]
    match strategy:
        case "scope":
            return p * (1 - p) * max(A, 0)
        case "covariance":
            return (row["logprobs"] - mean_logp) * (A - mean_A)
        case "entropy_change":
            inner = p * (math.log(p) + H) - sum(
                x**2 * (math.log(x) + H) for x in row["distribution"]
            )
            return max(A * inner, 0)
        case "residual":
            return max(p * (1 - p) * (max(A, 0) + (1 - 2 * p) * row["alpha_minus_beta"] / 2), 0)


@pytest.mark.parametrize("strategy", ["scope", "covariance", "entropy_change", "residual"])
@pytest.mark.parametrize("fraction", [0.05, 0.6])
def test_ranking_strategies_take_the_largest_scores(rows, strategy, fraction):
    mean_logp = sum(row["logprobs"] for row in rows) / N
    mean_A = sum(row["advantages"] for row in rows) / N
    scores = [slow_score(strategy, row, mean_logp, mean_A) for row in rows]
    selected = selected_of(rows, strategy, fraction=fraction)
    eligible = [i for i in range(N) if strategy == "covariance" or scores[i] > 0]
    count = min(round(fraction * N), len(eligible))
    assert len(selected) == count
    assert selected <= set(eligible)
    lowest = sorted((scores[i] for i in eligible), reverse=True)[count - 1]
    assert min(scores[i] for i in selected) == pytest.approx(lowest, rel=1e-9)  # ties are free
    assert {i for i in eligible if scores[i] > lowest + 1e-12} <= selected


@pytest.mark.parametrize("strategy", ["uniform", "forking", "non_forking", "covariance", "all"])
def test_tokens_without_advantage_may_be_selected_by_entropy_or_chance(strategy):
    assert scope.select_tokens(strategy, fraction=0.05, seed=0, **TOKENS_WITHOUT_ADVANTAGE).any()


@pytest.mark.parametrize("strategy", ["positive", "forking_positive", "scope"])
def test_tokens_without_advantage_are_not_selected_by_it(strategy):
    assert not scope.select_tokens(
        strategy, fraction=0.05, seed=0, **TOKENS_WITHOUT_ADVANTAGE
    ).any()


def slow_entropy(z):
    p = torch.softmax(z, 0)
    return -(p * p.log()).sum().item()


def test_entropy_change_is_the_slope_of_the_entropy():
    """-dH/eta by finite differences: one logit step eta A (1[y] - pi) at each context."""
    generator = torch.Generator().manual_seed(1)
    eta = 1e-5
    for _ in range(30):
        z = 2 * torch.randn(6, generator=generator, dtype=torch.float64)
        y = int(torch.randint(6, (1,), generator=generator))
        A = torch.randn(1, generator=generator).double()
        p = torch.softmax(z, 0)
        direction = A * (torch.eye(6, dtype=torch.float64)[y] - p)
        slope = (slow_entropy(z + eta * direction) - slow_entropy(z - eta * direction)) / (2 * eta)
        H = torch.tensor([slow_entropy(z)], dtype=torch.float64)
        baseline = scope.entropy_baseline(z[None])
        score = scope.entropy_change_score(p[y : y + 1].log(), H, A, baseline)
        assert score.item() == pytest.approx(max(-slope, 0), rel=1e-5, abs=1e-9)


def test_entropy_baseline_at_a_temperature_is_that_of_the_divided_logits():
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = torch.softmax(z / 0.7, 1)
    expected = [
        sum(x * x * (math.log(x) + slow_entropy(z[i] / 0.7)) for x in p[i].tolist())
        for i in range(3)
    ]
    assert scope.entropy_baseline(z, temperature=0.7).tolist() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- one-sample estimates of the KL


def test_k3_stays_finite_where_the_policy_has_ruled_a_token_out():
    """d is cut at 10: e^10 - 11, and no gradient beyond, also where e^d is no number."""
    logp = torch.tensor([-9.0, -90.0, -9000.0], requires_grad=True)
    value = scope.k3(logp, torch.tensor([-1.0, -1.0, -1.0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx(
        [math.exp(8) - 9, math.exp(10) - 11, math.exp(10) - 11], rel=1e-6
    )
    assert logp.grad.tolist() == pytest.approx([1 - math.exp(8), 0, 0], rel=1e-6)


def test_k3_gives_the_reference_no_gradient():
    logp = torch.tensor([-1.0], requires_grad=True)
    reference = torch.tensor([-2.0], requires_grad=True)
    scope.k3(logp, reference).backward()
    assert logp.grad is not None
    assert reference.grad is None


def test_k3_expectations():
    """By enumeration over y ~ pi: mean k3 = KL(pi || ref); mean gradient of k3 = gradient of KL(ref
    || pi), of k1 = 0, of k2 = gradient of KL(pi || ref).
    """
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(z, 0)
    log_ref = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    weight = logp.detach().exp()
    reverse = (logp.exp() * (logp - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - logp)).sum()
    k1 = (weight * (logp - log_ref)).sum()
    k2 = (weight * (logp - log_ref) ** 2 / 2).sum()
    k3 = (weight * scope.k3(logp, log_ref)).sum()

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    assert k3.item() == pytest.approx(reverse.item(), rel=1e-12)
    assert_close(gradient(k3), gradient(forward), rtol=1e-10, atol=1e-14)
    assert_close(gradient(k2), gradient(reverse), rtol=1e-10, atol=1e-14)
    assert gradient(k1).abs().max() < 1e-14


# ---------------------------------------------------------------- the residual, from the group


def test_group_alpha_minus_beta_against_loops():
    """By its definition: of siblings that agree up to t, those that continue alike or not."""
    generator = torch.Generator().manual_seed(1)
    G = 6
    C = 7
    tokens = torch.randint(3, (4 * G, C), generator=generator)
    tokens[G : 2 * G] = tokens[G]  # a group of equal completions
    lengths = torch.randint(1, C + 1, (4 * G,), generator=generator)
    mask = torch.arange(C) < lengths[:, None]
    A = torch.randn(4 * G, generator=generator)
    result, branching = scope.group_alpha_minus_beta(tokens.masked_fill(~mask, 0), mask, A, G)
    rewarded = A.clamp(min=0).tolist()
    seen = 0
    for i in range(4 * G):
        first = i // G * G
        for t in range(int(lengths[i])):
            alike = []
            other = []
            for j in range(first, first + G):
                if lengths[j] > t and tokens[j, :t].tolist() == tokens[i, :t].tolist():
                    if tokens[j, t] == tokens[i, t]:
                        alike.append(rewarded[j])
                    else:
                        other.append(rewarded[j])
            expected = 0.0
            if other:
                expected = sum(alike) / len(alike) - sum(other) / len(other)
            assert result[i, t].item() == pytest.approx(expected, abs=1e-6)
            assert branching[i, t].item() == bool(other)
            seen += bool(other)
    assert seen > 20
    assert not branching[G : 2 * G].any()
    assert not branching[~mask].any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_residual_score_is_half_of_S(p):
    """With alpha and beta exact, and A_scale in the place of [A]+, it is S_v / 2."""
    probs = torch.tensor([p, 1 - p], dtype=torch.float64)
    alpha = torch.tensor([1.4, 0.3], dtype=torch.float64)
    S, L, _ = scope.decompose(probs, alpha)
    A_scale = (probs * alpha).sum()
    score = scope.residual_score(probs[:1], A_scale, alpha[:1] - alpha[1:])
    assert score.item() == pytest.approx(S[0].item() / 2, rel=1e-12)
    without = scope.residual_score(probs[:1], A_scale, torch.zeros(1))
    assert without.item() == pytest.approx(L[0].item() / 2)
