"""Selection strategies and KL estimates against float64 loops written from their formulas."""

import math

import pytest
import torch

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
            }
        )
    return rows


def selected_of(rows, strategy, *, seed=0, fraction=0.05, forking_fraction=0.2):
    columns = {}
    for name in ("logprobs", "entropy", "advantages", "entropy_baseline"):
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


@pytest.mark.parametrize("strategy", ["scope", "covariance", "entropy_change"])
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
        baseline = (p**2 * (p.log() + H)).sum()
        score = scope.entropy_change_score(p[y : y + 1].log(), H, A, baseline)
        assert score.item() == pytest.approx(-slope, rel=1e-5, abs=1e-9)
