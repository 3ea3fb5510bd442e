r"""Exact values of LaTeX expressions: `\frac{1}{\sqrt{2}}` and `\frac{\sqrt 2}{2}` are one number; nothing is rounded.

A value is a quotient of two polynomials. A polynomial is {monomial: coefficient}, a monomial a sorted tuple of
(atom, exponent). An atom is a name, or a prime under a root: sqrt(12) is {((3, 1/2),): 2}, and i is {((-1, 1/2),): 1},
so that one rule turns whole powers of both into numbers. What has no such form (sin x, 2^n, |x|) is an atom of its
own, named by its canonical text. Symbols under roots count as positive.

Texts come from models, so work is bounded: nesting, digits, exponents, and a budget pays for every product of terms.
"""

import math
import re
from fractions import Fraction

TOKEN = re.compile(r'"[^"]*"|\\[a-zA-Z]+|\\.|\d+\.?\d*|\.\d+|[<>!]=|[a-zA-Z]{4,}|\s+|.', re.DOTALL)
FUNCTIONS = {"\\" + name for name in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ENDS = {"end", "+", "-", ")", "]", "}", "|"}  # of a product

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


def symbol(name: str) -> tuple[dict, dict]:
    return {((name, Fraction(1)),): Fraction(1)}, ONE


def number(value) -> tuple[dict, dict]:
    return ({(): Fraction(value)} if value else {}), ONE


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


class Expression:
    """Reads a sum of products of powers of atoms by recursive descent; `.value()` raises NoValue for any other text."""

    def __init__(self, text: str, budget: Budget):
        self.tokens = [token for token in TOKEN.findall(text) if not token.isspace()] + ["end"]
        self.place, self.depth, self.budget = 0, 0, budget

    @property
    def next(self) -> str:
        return self.tokens[self.place]

    def take(self, *expected: str) -> str:
        token = self.next
        if token == "end" or (expected and token not in expected):
            raise NoValue(f"{token} is not expected")
        self.place += 1
        return token

    def value(self):
        value = self.sum()
        if self.next != "end":
            raise NoValue(f"{self.next} is not expected")
        return value

    def sum(self):
        total = number(0)
        while True:
            sign = self.sign()
            (n, d), (m, e) = total, self.product()
            total = self.quotient(add(self.times(n, e), self.times(m, d), sign), self.times(d, e))
            if self.next not in ("+", "-"):
                return total

    def sign(self) -> int:
        return -1 if self.next in ("+", "-") and self.take() == "-" else 1

    def product(self, *, of_function: bool = False):
        """Factors side by side or with * and /; those of a function's bare argument end at the next function."""
        n, d = self.power()
        while self.next not in ENDS and not (of_function and self.next in {"*", "/", *FUNCTIONS}):
            if self.is_word():
                m, e = self.unit()
            elif self.next in ("*", "/"):
                divided = self.take() == "/"
                sign = self.sign()
                m, e = self.power()
                m, e = (e, m) if divided else (m, e)
                m = self.times(m, {(): Fraction(sign)})
            else:
                m, e = self.power()
            n, d = self.quotient(self.times(n, m), self.times(d, e))
        return n, d

    def is_word(self) -> bool:
        return self.next[0] == '"' or (self.next.isalpha() and len(self.next) > 3)

    def unit(self):
        """Words that end a product are a unit, worth 1, or a scale like million."""
        scale = 0
        while self.is_word():
            word = self.take().strip('" .').lower()
            scale += SCALES.get(word, 0)
            if not re.fullmatch(r"[a-z./ ]*", word):
                raise NoValue(f"{word} is no unit")
        if self.next == "^":  # cm^2
            self.take()
            self.argument()
        if self.next not in ENDS:
            raise NoValue("a word within a product")
        return number(10**scale)

    def power(self):
        base = self.atom()
        while self.next in ("^", "!", "'"):
            mark = self.take()
            base = self.raised(base, self.argument()) if mark == "^" else symbol(canonical(base) + mark)
        return base

    def argument(self):
        """What follows ^, _ or a command: a group, or a single atom."""
        sign = self.sign()
        n, d = self.atom()
        return self.times(n, {(): Fraction(sign)}), d

    def atom(self):
        self.depth += 1
        if self.depth > 20:
            raise NoValue("too deep")
        value = self.atom_at(self.take())
        self.depth -= 1
        return value

    def atom_at(self, token: str):
        if token in ("(", "{", "[", "|"):
            value = self.sum()
            self.take({"(": ")", "{": "}", "[": "]", "|": "|"}[token])
            return symbol(f"|{canonical(value)}|") if token == "|" else value
        if token == r"\frac":
            (n, d), (m, e) = self.argument(), self.argument()
            return self.quotient(self.times(n, e), self.times(d, m))
        if token == r"\sqrt":
            n, d = self.atom() if self.next == "[" else number(2)
            return self.raised(self.argument(), self.quotient(d, n))
        if token in FUNCTIONS:
            return self.function(token)
        if token[0].isdecimal() or token[0] == ".":
            if len(token) > 60 or token == ".":
                raise NoValue("no number, or too long")
            digits = token.rstrip(".")
            return symbol(digits + self.subscript()) if self.next == "_" else number(Fraction(digits))  # 21_3: a base
        if token[0].isalpha() or token[0] == '"' or len(token) > 2:
            name = token.strip('" ')
            name = (name.lower() if len(name) > 3 else name) + self.subscript()
            return self.raised(number(-1), number(Fraction(1, 2))) if name == "i" else symbol(name)
        raise NoValue(f"{token} is not expected")

    def subscript(self) -> str:
        """The tokens of a subscript as they stand, '' if there is none."""
        if self.next != "_":
            return ""
        self.take()
        inner, depth = [], 0
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            inner.append(token)
            if depth == 0:
                return "_" + "".join(inner).strip("{}")

    def function(self, name: str):
        exponent = number(1)
        while self.next in ("_", "^"):
            if self.next == "_":
                name += self.subscript()
            else:
                self.take()
                exponent = self.argument()
        inner = self.atom() if self.next in ("(", "{") else self.product(of_function=True)
        return self.raised(symbol(f"{name}({canonical(inner)})"), exponent)

    def times(self, a: dict, b: dict) -> dict:
        return multiply(a, b, self.budget)

    def quotient(self, numerator: dict, denominator: dict):
        """The denominator becomes 1 where it has a single term."""
        if not denominator:
            raise NoValue("division by zero")
        if len(denominator) > 1:
            return numerator, denominator
        ((monomial, coefficient),) = denominator.items()
        return self.times(numerator, {tuple((atom, -e) for atom, e in monomial): 1 / coefficient}), ONE

    def raised(self, base, exponent):
        """base ^ exponent; an atom of its own where the exponent is no number, or nothing simpler is known."""
        (n, d), (m, e) = base, exponent
        power = m.get((), Fraction(0))
        if e != ONE or m.keys() - {()}:
            return symbol(f"({canonical(base)})^({canonical(exponent)})")
        if power.denominator == 1 and abs(power) <= 64:
            n, d = (n, d) if power >= 0 else (d, n)
            numerator, denominator = ONE, ONE
            for _ in range(abs(int(power))):
                numerator, denominator = self.times(numerator, n), self.times(denominator, d)
            return self.quotient(numerator, denominator)
        if len(n) == 1 and d == ONE and power.denominator > 1:
            ((monomial, coefficient),) = n.items()
            powers = {atom: exponent * power for atom, exponent in monomial}
            if coefficient < 0 and power.denominator % 2:  # the real root
                coefficient, sign = -coefficient, Fraction((-1) ** power.numerator)
            else:
                sign = Fraction(1)
            if coefficient < 0:
                powers[-1] = powers.get(-1, 0) + power
            for part, side in ((abs(coefficient.numerator), 1), (coefficient.denominator, -1)):
                self.budget.spend(1 + min(math.isqrt(part), 3000) // 30)  # trial divisions
                for prime, count in primes(part).items():
                    powers[prime] = powers.get(prime, 0) + side * count * power
            return self.times({tuple(powers.items()): sign}, ONE), ONE
        return {((canonical(base), power),): Fraction(1)}, ONE
