"""A normalised text to its exact value; nesting, digits and exponents are bounded."""

import math
import re
from fractions import Fraction

from grading.latex import TOKEN
from grading.values import ONE, Budget, NoValue, add, canonical, multiply, natural, negative, number, primes, symbol

ENDS = {"end", "+", "-", ")", "]", "}"}  # of a product
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
FUNCTIONS = {"\\" + name for name in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()}
SYMBOLS = {"\\" + name for name in (  # any other command binds what follows, like a function
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega infty emptyset ell "
    "ldots dots cdots").split()}
DIGITS = set("0123456789.")


class Expression:
    """Reads a sum of products of powers of atoms by recursive descent; `.value()` raises NoValue for any other text."""

    def __init__(self, text: str, budget: Budget):
        self.tokens = [token for token in TOKEN.findall(text) if not token.isspace()] + ["end"]
        self.place, self.depth, self.in_bars, self.budget = 0, 0, False, budget

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
            (n, d), (m, e) = total, self.signed(self.product)
            total = self.quotient(add(self.times(n, e), self.times(m, d)), self.times(d, e))
            if self.next not in ("+", "-"):
                return total

    def signed(self, part):
        minus = False
        while self.next in ("+", "-"):
            minus ^= self.take() == "-"
        return negative(part()) if minus else part()

    def product(self, *, of_function: bool = False):
        """Factors side by side or with * and /; those of a function's bare argument end at the next function."""
        n, d = self.power()
        while not self.at_end() and not (of_function and self.next in {"*", "/", *FUNCTIONS}):
            before = self.tokens[max(self.place - 2, 0) : self.place]
            if self.next[0] == '"':
                m, e = self.unit()
            elif self.next in ("*", "/"):
                divided = self.take() == "/"
                m, e = self.signed(self.power)
                m, e = (e, m) if divided else (m, e)
            elif self.next[0] in DIGITS and before[-1][0] in DIGITS and before[0] != "^":
                raise NoValue("two numbers side by side")
            else:
                m, e = self.power()
            n, d = self.quotient(self.times(n, m), self.times(d, e))
        return n, d

    def at_end(self) -> bool:
        return self.next in ENDS or (self.next == "|" and self.in_bars)

    def unit(self):
        """Words that end a product are a unit, worth 1, or a scale like million: 5 million people, 3 cm^2, 9 km/h."""
        scale = 0
        while self.next[0] == '"':
            phrase = self.take().strip('" ').lower()
            scale += sum(SCALES.get(word, 0) for word in phrase.split())
            if not re.fullmatch(r"[a-z./ ]*", phrase):
                raise NoValue(f"{phrase} is no unit")
            if self.next == "^":
                self.take()
                self.argument()
            if self.next in ("/", "*") and self.tokens[self.place + 1][0] == '"':
                self.take()
        if not self.at_end():
            raise NoValue("a word within a product")
        return number(10**scale)

    def power(self):
        base = self.atom()
        while self.next in ("^", "!", "'"):
            mark = self.take()
            if mark == "^":
                base = self.raised(base, self.argument())
            elif mark == "!" and (whole := natural(base)) is not None:
                base = number(math.factorial(whole))
            else:
                base = symbol(f"({canonical(base)}){mark}")
        return base

    def argument(self):
        """What follows ^ or a command: a group, or a single atom."""
        return self.signed(self.atom)

    def atom(self):
        self.depth += 1
        if self.depth > 20:
            raise NoValue("too deep")
        value = self.atom_at(self.take())
        self.depth -= 1
        return value

    def atom_at(self, token: str):
        if token in ("(", "{", "[", "|"):
            outside, self.in_bars = self.in_bars, token == "|"
            value = self.sum()
            self.take({"(": ")", "{": "}", "[": "]", "|": "|"}[token])
            self.in_bars = outside
            return self.absolute(value) if token == "|" else value
        if token in (r"\frac", r"\binom"):
            (n, d), (m, e) = one, other = self.argument(), self.argument()
            if token == r"\frac":
                return self.quotient(self.times(n, e), self.times(d, m))
            top, bottom = natural(one), natural(other)
            return symbol(f"({one}over{other})") if None in (top, bottom) else number(math.comb(top, bottom))
        if token == r"\sqrt":
            n, d = self.atom() if self.next == "[" else number(2)
            return self.raised(self.argument(), self.quotient(d, n))
        if token[0] in DIGITS:
            if len(token) > 60 or token == ".":
                raise NoValue("no number, or too long")
            return symbol(token + self.subscript()) if self.next == "_" else number(Fraction(token))  # 21_3: a base
        if token[0].isalpha() or token[0] == '"' or token in SYMBOLS:
            name = token.strip('" ')
            name = (name.lower() if token not in SYMBOLS and len(name) > 3 else name) + self.subscript()
            return self.raised(number(-1), number(Fraction(1, 2))) if name == "i" else symbol(name)
        if token[0] == "\\" and len(token) > 2:
            return self.function(token)
        raise NoValue(f"{token} is not expected")

    def absolute(self, value):
        if not value[0].keys() - {()} and value[1] == ONE:
            return number(abs(value[0].get((), 0)))
        return symbol(f"|{min(canonical(value), canonical(negative(value)))}|")

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
        if exponent == number(-1) and name in FUNCTIONS:  # the inverse function, not the reciprocal
            name, exponent = name.replace("\\", r"\arc"), number(1)
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
        if e != ONE:
            return symbol(f"({canonical(base)})^({canonical(exponent)})")
        if symbols := m.keys() - {()}:  # b^(k s + c) is (b^s)^k b^c, with an atom for each b^s
            powers = tuple((f"({canonical(base)})^({canonical(({s: Fraction(1)}, ONE))})", m[s]) for s in symbols)
            n, d = self.raised(base, number(power))
            return self.times({powers: Fraction(1)}, n), d
        if not n and power > 0:
            return number(0)
        if power.denominator == 1 and abs(power) <= (64 if len(n) + len(d) > 2 else 512):
            n, d = (n, d) if power >= 0 else (d, n)
            numerator, denominator = ONE, ONE
            for _ in range(abs(int(power))):
                numerator, denominator = self.times(numerator, n), self.times(denominator, d)
            return self.quotient(numerator, denominator)
        if len(n) == 1 and d == ONE and power.denominator > 1:
            ((monomial, coefficient),) = n.items()
            if -1 in dict(monomial):
                raise NoValue("a root of an imaginary number")
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
            return self.times({tuple(powers.items()): sign}, ONE), ONE  # a product, to take whole powers out
        return {((canonical(base), power),): Fraction(1)}, ONE
