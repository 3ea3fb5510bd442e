"""Selection strategies and KL estimates against float64 loops written from their formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

import grpo
import scope

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
                     "collision": sum(x * x * (math.log(x) + H) for x in p), "gap": math.sin(i)})
    keys = {"logprobs": "logp", "entropy": "H", "advantages": "A", "collision": "collision", "gap": "gap"}
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
            case "entropy_change":
                inner = p * (math.log(p) + row["H"]) - sum(x**2 * (math.log(x) + row["H"]) for x in row["p"])
                return max(A * inner, 0)
            case "residual":
                return max(p * (1 - p) * (max(A, 0) + (1 - 2 * p) * row["gap"] / 2), 0)

    return [score(row) for row in rows]


@pytest.mark.parametrize("strategy", ["scope", "covariance", "entropy_change", "residual"])
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
    for strategy in ("uniform", "forking", "non_forking", "covariance", "all"):
        assert scope.select_tokens(strategy, fraction=0.05, seed=0, **idle).any(), strategy
    for strategy in ("positive", "forking_positive", "scope"):
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


def test_k3_stays_finite_where_the_policy_has_ruled_a_token_out():
    """d is cut at 10: e^10 - 11, and no gradient beyond, also where e^d is no number."""
    logp = torch.tensor([-9.0, -90.0, -9000.0], requires_grad=True)
    value = scope.k3(logp, torch.tensor([-1.0, -1.0, -1.0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(8) - 9, math.exp(10) - 11, math.exp(10) - 11], rel=1e-6)
    assert logp.grad.tolist() == pytest.approx([1 - math.exp(8), 0, 0], rel=1e-6)


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


# ---------------------------------------------------------------- the residual, from the group


def test_sibling_gap_against_loops():
    """alpha - beta by its definition: siblings that agree up to t, those that go on alike against the others."""
    generator = torch.Generator().manual_seed(1)
    G, C = 6, 7
    tokens = torch.randint(3, (4 * G, C), generator=generator)
    tokens[G : 2 * G] = tokens[G]  # a group of equal completions
    lengths = torch.randint(1, C + 1, (4 * G,), generator=generator)
    mask = torch.arange(C) < lengths[:, None]
    A = torch.randn(4 * G, generator=generator)
    gap, branching = scope.sibling_gap(tokens.masked_fill(~mask, 0), mask, A, G)
    seen = 0
    for i in range(4 * G):
        for t in range(int(lengths[i])):
            group = range(i // G * G, i // G * G + G)
            siblings = [j for j in group if lengths[j] > t and tokens[j, :t].tolist() == tokens[i, :t].tolist()]
            alike = [max(A[j].item(), 0) for j in siblings if tokens[j, t] == tokens[i, t]]
            other = [max(A[j].item(), 0) for j in siblings if tokens[j, t] != tokens[i, t]]
            expected = sum(alike) / len(alike) - sum(other) / len(other) if other else 0.0
            assert gap[i, t].item() == pytest.approx(expected, abs=1e-6) and branching[i, t].item() == bool(other)
            seen += bool(other)
    assert seen > 20 and not branching[G : 2 * G].any() and not branching[~mask].any()


def test_recovered_score_is_half_of_S():
    """With alpha and beta exact, and A_scale in the place of [A]+, it is S_v / 2 of Proposition 1."""
    for p in (0.1, 0.5, 0.8):
        probs = torch.tensor([p, 1 - p], dtype=torch.float64)
        alpha = torch.tensor([1.4, 0.3], dtype=torch.float64)
        S, L, _ = scope.decompose(probs, alpha)
        scale = (probs * alpha).sum()
        score = scope.recovered_score(probs[:1], scale, alpha[:1] - alpha[1:])
        assert score.item() == pytest.approx(S[0].item() / 2, rel=1e-12)
        assert scope.recovered_score(probs[:1], scale, torch.zeros(1)).item() == pytest.approx(L[0].item() / 2)
