"""Appendix A, checked two ways.

In exact rational arithmetic, written from the definitions by enumeration of outcomes, every
identity must hold with `==`. The float64 functions of scope.py must then agree with those exact
values to 1e-12.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, just, lists, one_of, randoms, tuples
from torch.testing import assert_close

import scope

# Logits up to +-30: probabilities down to 1e-26 and up to 1 - 1e-26. alpha may be 0.
logits = floats(-30, 30, allow_nan=False).map(lambda x: round(x, 6))
magnitudes = one_of(just(0.0), floats(1e-3, 5.0))
contexts = integers(2, 9).flatmap(
    lambda v: tuples(
        lists(logits, min_size=v, max_size=v), lists(magnitudes, min_size=v, max_size=v)
    )
)
many = settings(max_examples=60, deadline=None)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy(values: list[float]) -> torch.Tensor:
    return torch.softmax(float64(values), dim=0)


class Exact:
    """One context in rational arithmetic, straight from Definitions 3-8: sums over outcomes y."""

    def __init__(self, probs: torch.Tensor, alpha: list[float]):
        fractions = [Fraction(p) for p in probs.tolist()]
        self.p = [p / sum(fractions) for p in fractions]  # the float policy, with sum exactly 1
        self.alpha = [Fraction(a) for a in alpha]
        self.tokens = range(len(self.p))
        self.scale = sum(p * a for p, a in zip(self.p, self.alpha))  # Eq. 30

    def all(self, quantity):
        return [quantity(v) for v in self.tokens]

    def indicator(self, y, v):
        return int(y == v)

    def S(self, v):  # Definition 5: E[|A| |1[y = v] - p_v|]
        push = [abs(self.indicator(y, v) - self.p[v]) for y in self.tokens]
        return sum(self.p[y] * self.alpha[y] * push[y] for y in self.tokens)

    def beta(self, v):  # Eq. 25: E[|A| given y != v]
        return sum(self.p[y] * self.alpha[y] for y in self.tokens if y != v) / (1 - self.p[v])

    def covariance(self, v):  # E[|A| I] - E|A| E[I]
        joint = sum(self.p[y] * self.alpha[y] * self.indicator(y, v) for y in self.tokens)
        return joint - self.scale * self.p[v]

    def delta(self, v):  # Definition 7
        return self.alpha[v] - self.scale

    def delta_tilde(self, v):  # Eq. 32
        return sum(self.p[u] / (1 - self.p[v]) * self.delta(u) for u in self.tokens if u != v)

    def L(self, v):  # Eq. 45
        return 2 * self.scale * self.p[v] * (1 - self.p[v])

    def R(self, v):  # Eq. 46
        return (1 - 2 * self.p[v]) * self.covariance(v)


def check_close(value: torch.Tensor, exact: list[Fraction], size: list[Fraction] | None = None):
    """Assert agreement to 1e-12 of the exact value, or of `size` where it is a difference."""
    for x, y, s in zip(value.tolist(), exact, size or exact, strict=True):
        assert abs(Fraction(x) - y) <= Fraction(1, 10**12) * abs(s)


@many
@given(contexts)
def test_every_identity_holds_exactly(context):
    values, magnitudes = context
    c = Exact(policy(values), magnitudes)
    assert sum(c.p[v] * c.delta(v) for v in c.tokens) == 0  # Lemma 1
    for v in c.tokens:
        p = c.p[v]
        delta = c.delta(v)
        difference = c.alpha[v] - c.beta(v)
        assert c.S(v) == p * (1 - p) * (c.alpha[v] + c.beta(v))  # Prop. 4
        assert c.delta_tilde(v) == -p * delta / (1 - p)  # Lemma 2
        assert delta + c.delta_tilde(v) == delta * (1 - 2 * p) / (1 - p)  # Corollary 1
        assert c.S(v) == 2 * c.scale * p * (1 - p) + p * (1 - 2 * p) * delta  # Eq. 37
        assert delta == c.covariance(v) / p  # Eq. 40
        assert c.covariance(v) == p * (1 - p) * difference  # Eq. 42
        assert c.S(v) == 2 * c.scale * p * (1 - p) + (1 - 2 * p) * c.covariance(v)  # Eq. 44
        assert c.S(v) == c.L(v) + c.R(v)  # Prop. 1, Eq. 47
        if c.scale:  # Eq. 52
            assert abs(c.R(v)) / c.L(v) == abs(1 - 2 * p) * abs(difference) / (2 * c.scale)


@many
@given(contexts)
def test_scope_functions_agree_with_exact_values(context):
    values, magnitudes = context
    probs = policy(values)
    alpha = float64(magnitudes)
    c = Exact(probs, magnitudes)
    S, L, R = scope.decompose(probs, alpha)
    exact_S = c.all(c.S)
    check_close(S, exact_S)
    check_close(L, c.all(c.L))
    check_close(R, c.all(c.R), size=exact_S)  # |R| <= S, and R may cancel to 0
    check_close(scope.advantage_scale(probs, alpha), [c.scale])
    check_close(scope.mean_without(probs, alpha), c.all(c.beta))
    spread = [a + c.scale for a in c.alpha]
    check_close(scope.deviation(probs, alpha), c.all(c.delta), size=spread)  # Def. 7
    check_close(scope.coupling(probs, alpha), c.all(c.covariance), size=exact_S)  # Eq. 42
    if c.scale:  # Eq. 52, which is a difference of two such terms
        ratio = [abs(c.R(v)) / c.L(v) for v in c.tokens]
        terms = [(c.alpha[v] + c.beta(v)) / c.scale for v in c.tokens]
        check_close(scope.residual_ratio(probs, alpha), ratio, size=terms)


@many
@given(contexts, floats(0.01, 10))
def test_identities_between_scope_functions(context, eta):
    """The steps of A.11-A.18 as relations between the float functions themselves."""
    values, magnitudes = context
    p = policy(values)
    alpha = float64(magnitudes)
    others = scope.over_others(p)
    beta = scope.mean_without(p, alpha)
    delta = scope.deviation(p, alpha)
    coupling = scope.coupling(p, alpha)
    scale = scope.advantage_scale(p, alpha)
    S, L, R = scope.decompose(p, alpha, eta=eta)

    def check_same(a, b, size):
        assert ((a - b).abs() <= 1e-12 * size).all()

    delta_tilde = beta - scale  # Eq. 33
    check_same((p * delta).sum(), torch.zeros(()), (p * (alpha + scale)).sum())  # Lemma 1
    check_same(delta_tilde * others, -p * delta, alpha + beta)  # Lemma 2
    check_same((delta + delta_tilde) * others, delta * (1 - 2 * p), alpha + beta)  # Corollary 1
    check_same(S, eta * p * others * (alpha + beta), S)  # Prop. 4
    check_same(S, 2 * eta * scale * p * others + eta * p * (1 - 2 * p) * delta, S)  # Eq. 37
    check_same(delta * p, coupling, p * others * (alpha + beta))  # Eq. 40
    check_same(coupling, p * others * (alpha - beta), p * others * (alpha + beta))  # Eq. 42
    check_same(S, L + eta * (1 - 2 * p) * coupling, S)  # Eq. 44
    check_same(S, L + R, S)  # Eq. 47


@many
@given(contexts, floats(0.01, 10))
def test_S_is_L_plus_R_in_floats(context, eta):
    """Prop. 1 as a reader would check it: 1e-12 relative, p near 0 and 1 and alpha = 0 included."""
    values, magnitudes = context
    S, L, R = scope.decompose(policy(values), float64(magnitudes), eta=eta)
    assert_close(L + R, S, rtol=1e-12, atol=0)
    assert (S >= 0).all()
    assert (L >= 0).all()
    assert (R.abs() <= S * (1 + 1e-12)).all()


@many
@given(lists(logits, min_size=2, max_size=9))
def test_proposition_2_softmax_log_derivative(values):
    jacobian = torch.autograd.functional.jacobian(
        lambda z: torch.log_softmax(z, dim=0), float64(values)
    )
    assert_close(scope.score_jacobian(policy(values)), jacobian, rtol=1e-12, atol=1e-15)


@many
@given(contexts, randoms(use_true_random=False))
def test_proposition_3_conditional_score(context, random):
    """Signed advantages: g_v = E[A (1[y = v] - p_v)], by enumeration and by autograd."""
    values, magnitudes = context
    signed = [a * random.choice([-1, 1]) for a in magnitudes]
    probs = policy(values)
    c = Exact(probs, signed)
    exact = []
    size = []
    for v in c.tokens:
        terms = [c.p[y] * c.alpha[y] * (c.indicator(y, v) - c.p[v]) for y in c.tokens]
        exact.append(sum(terms))
        size.append(sum(map(abs, terms)))
    score = scope.conditional_score(probs, float64(signed))
    check_close(score, exact, size=size)
    z = float64(values).requires_grad_()
    # the probabilities are data here: y was sampled
    (probs * float64(signed) * torch.log_softmax(z, dim=0)).sum().backward()
    assert_close(score, z.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("v", [2, 5, 50])
def test_S_against_enumeration_of_outcomes(v):
    """E|Delta| over (token, advantage) pairs; the advantage given a token is random too."""
    generator = torch.Generator().manual_seed(v)
    probs = torch.softmax(4 * torch.randn(v, generator=generator, dtype=torch.float64), dim=0)
    # given y, A takes one of 3 values
    outcomes = torch.randn(v, 3, generator=generator, dtype=torch.float64)
    weights = torch.softmax(torch.randn(v, 3, generator=generator, dtype=torch.float64), dim=1)
    eta = 0.3
    expected = torch.zeros(v, dtype=torch.float64)
    for target in range(v):
        for y in range(v):
            for a, w in zip(outcomes[y], weights[y]):
                expected[target] += probs[y] * w * abs(eta * a * (int(y == target) - probs[target]))
    alpha = (outcomes.abs() * weights).sum(dim=1)
    assert_close(scope.decompose(probs, alpha, eta=eta).S, expected, rtol=1e-12, atol=0)


def test_S_against_monte_carlo():
    """A mean of |Delta| over 200,000 draws lies within 4.5 standard errors of S."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64)
    scale = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    n = 200_000
    y = torch.multinomial(probs, n, replacement=True, generator=generator)
    advantage = scale[y] * torch.randn(n, generator=generator, dtype=torch.float64)
    alpha = scale * (2 / torch.pi) ** 0.5  # E|N(0, s)|
    delta = (advantage[:, None] * (torch.nn.functional.one_hot(y, 4) - probs)).abs()
    error = delta.std(dim=0) / n**0.5
    assert ((delta.mean(dim=0) - scope.decompose(probs, alpha).S).abs() < 4.5 * error).all()


def test_residual_ratio():
    """Eq. 52 is |R| / L; Eq. 53: it vanishes at p = 1/2 however strong the coupling."""
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    alpha = torch.tensor([3.0, 0.1, 1.0], dtype=torch.float64)
    S, L, R = scope.decompose(probs, alpha)
    assert_close(scope.residual_ratio(probs, alpha), R.abs() / L, rtol=1e-12, atol=0)
    assert scope.residual_ratio(probs, alpha)[0] == 0
    for strong in (1e-6, 1e6):
        half = torch.tensor([0.5, 0.5])
        assert scope.residual_ratio(half, torch.tensor([strong, 1.0])).tolist() == [0, 0]


def test_batches_of_contexts():
    probs = torch.softmax(torch.randn(4, 3, 6, dtype=torch.float64), dim=-1)
    alpha = torch.rand(4, 3, 6, dtype=torch.float64)
    together = scope.decompose(probs, alpha)
    for i in range(4):
        for j in range(3):
            for whole, single in zip(together, scope.decompose(probs[i, j], alpha[i, j])):
                assert_close(whole[i, j], single, rtol=1e-14, atol=0)
