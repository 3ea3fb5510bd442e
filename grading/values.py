r"""Exact values: `\frac{1}{\sqrt{2}}` and `\frac{\sqrt 2}{2}` are one number, and nothing is rounded.

A value is a quotient of two polynomials. A polynomial is {monomial: coefficient}, a monomial a sorted tuple of
(atom, exponent). An atom is a name, or a prime under a root: sqrt(12) is {((3, 1/2),): 2}, and i is
{((-1, 1/2),): 1}, so that one rule turns whole powers of both into numbers. What has no such form (sin x, 2^n, |x|)
is an atom of its own, named by its canonical text. Symbols under roots count as positive.

Texts come from models, so work is bounded: digits, exponents, and a budget pays for every product of terms.
"""

from fractions import Fraction

ONE = {(): Fraction(1)}


class NoValue(ValueError):
    """The text is no expression, or too much work."""


class Budget:
    def __init__(self, work: int = 2000):
        self.left = work

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise NoValue("too much work")


def add(a: dict, b: dict, sign: int = 1) -> dict:
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, 0) + sign * coefficient
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def multiply(a: dict, b: dict, budget: Budget) -> dict:
    total: dict = {}
    for m, c in a.items():
        for n, d in b.items():
            budget.spend(1 + (len(m) + len(n)) // 2)
            powers, factor = dict(m), c * d
            for atom, exponent in n:
                powers[atom] = powers.get(atom, 0) + exponent
            for atom, exponent in powers.items():
                if type(atom) is int and (whole := exponent // 1):  # whole powers of a prime leave its root
                    if abs(whole) > 1000:
                        raise NoValue("too large a power")
                    factor *= Fraction(atom) ** whole
                    powers[atom] = exponent - whole
            if factor.numerator.bit_length() + factor.denominator.bit_length() > 2000:
                raise NoValue("too long a number")
            monomial = tuple(sorted((power for power in powers.items() if power[1]), key=str))
            total[monomial] = total.get(monomial, 0) + factor
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def canonical(value: tuple[dict, dict]) -> str:
    """One text for each value, to name an atom by."""
    terms = [[f"{c}" + "".join(f"*({atom})^{e}" for atom, e in m) for m, c in part.items()] for part in value]
    text = "/".join("+".join(sorted(part)) for part in terms)
    if len(text) > 1000:
        raise NoValue("too long")
    return text


def equal(a: tuple[dict, dict], b: tuple[dict, dict], budget: Budget) -> bool:
    return multiply(a[0], b[1], budget) == multiply(b[0], a[1], budget)


def difference(a: tuple[dict, dict], b: tuple[dict, dict], budget: Budget) -> tuple[dict, dict]:
    return add(multiply(a[0], b[1], budget), multiply(b[0], a[1], budget), -1), multiply(a[1], b[1], budget)


def negative(value: tuple[dict, dict]) -> tuple[dict, dict]:
    return {monomial: -coefficient for monomial, coefficient in value[0].items()}, value[1]


def symbol(name: str) -> tuple[dict, dict]:
    return {((name, Fraction(1)),): Fraction(1)}, ONE


def number(value) -> tuple[dict, dict]:
    return ({(): Fraction(value)} if value else {}), ONE


def natural(value: tuple[dict, dict]) -> int | None:
    """The whole number from 0 to 100 that a value is, else None."""
    whole = value[0].get((), Fraction(0))
    plain = value[1] == ONE and not value[0].keys() - {()} and whole.denominator == 1 and 0 <= whole <= 100
    return int(whole) if plain else None


def primes(n: int) -> dict[int, int]:
    """{prime: exponent} of n >= 1, by trial division up to 3000."""
    found: dict[int, int] = {}
    for p in range(2, 3000):
        while n % p == 0:
            n //= p
            found[p] = found.get(p, 0) + 1
        if p * p > n:
            break
    if n >= 3000**2:
        raise NoValue("too large a number under a root")
    return found if n == 1 else found | {n: 1}
