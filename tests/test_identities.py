"""Appendix A, checked two ways.

In exact rational arithmetic, written from the definitions by enumeration of outcomes, every
identity must hold with `==`. The float64 functions of scope.py must then agree with those exact
values to 1e-12.
"""

from fractions import Fraction

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
@given(contexts, floats(0.01, 10))
def test_scope_functions_agree_with_exact_values(context, eta):
    values, magnitudes = context
    probs = policy(values)
    alpha = float64(magnitudes)
    c = Exact(probs, magnitudes)
    S, L, R = scope.decompose(probs, alpha, eta=eta)
    exact_S = c.all(c.S)
    updates = [Fraction(eta) * x for x in exact_S]
    check_close(S, updates)
    check_close(L, [Fraction(eta) * x for x in c.all(c.L)])
    check_close(
        R, [Fraction(eta) * x for x in c.all(c.R)], size=updates
    )  # |R| <= S, and R may cancel to 0
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


def test_batches_of_contexts():
    probs = torch.softmax(torch.randn(4, 3, 6, dtype=torch.float64), dim=-1)
    alpha = torch.rand(4, 3, 6, dtype=torch.float64)
    together = scope.decompose(probs, alpha)
    for i in range(4):
        for j in range(3):
            for whole, single in zip(together, scope.decompose(probs[i, j], alpha[i, j])):
                assert_close(whole[i, j], single, rtol=1e-14, atol=0)
