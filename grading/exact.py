r"""Reads a LaTeX expression as an exact value: `\frac{1}{\sqrt{2}}` equals `\frac{\sqrt 2}{2}`.

A value is a quotient of two polynomials. A polynomial is {monomial: coefficient}, and a monomial
is a sorted tuple of (atom, exponent). An atom is a name, or a prime number under a root:

    3x^2 + 1    {(("x", 2),): 3, (): 1}
    sqrt(12)    {((3, 1/2),): 2}
    i           {((-1, 1/2),): 1}

Whole powers of a prime, or of -1, move into the coefficient: this one rule simplifies roots and i.
What has no such form (sin x, 2^n, |x|) is an atom too, named by its canonical text. Symbols under
roots count as positive. Nothing is rounded.

Texts come from models, so work is bounded: digits, nesting and exponents have limits, and every
product of two terms spends from a budget.
"""

import math
import re
from fractions import Fraction

from grading.latex import SCALES, TOKEN

ONE = {(): Fraction(1)}  # the polynomial 1


class NoValue(ValueError):
    """Says that a text is no expression, or that reading it is too much work."""


class Budget:
    """Counts the work that is left for one comparison."""

    left = 2000

    def spend(self, work):
        self.left -= work
        if self.left < 0:
            raise NoValue("too much work")


# ---------------------------------------------------------------- polynomials


def plus(a: dict, b: dict) -> dict:
    """Return a + b without terms that are zero."""
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, 0) + coefficient
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def times(a: dict, b: dict, budget: Budget) -> dict:
    """Return a * b; whole powers of primes move into the coefficients."""
    total = {}
    for left, left_coefficient in a.items():
        for right, right_coefficient in b.items():
            budget.spend(1 + (len(left) + len(right)) // 2)
            coefficient = left_coefficient * right_coefficient
            powers = dict(left)
            for atom, exponent in right:
                powers[atom] = powers.get(atom, 0) + exponent
            for atom, exponent in powers.items():
                whole = exponent // 1
                if type(atom) is int:
                    if abs(whole) > 1000:
                        raise NoValue("too large a power")
                    coefficient *= Fraction(atom) ** whole
                    powers[atom] = exponent - whole
            if coefficient.numerator.bit_length() + coefficient.denominator.bit_length() > 2000:
                raise NoValue("too long a number")
            monomial = tuple(sorted((power for power in powers.items() if power[1]), key=str))
            total[monomial] = total.get(monomial, 0) + coefficient
    return plus(total, {})


def factorise(n: int, budget: Budget) -> dict:
    """Return {prime: exponent} of n >= 1, by trial division up to 3000."""
    budget.spend(1 + min(math.isqrt(n), 3000) // 30)
    factors = {}
    for prime in range(2, 3000):
        while n % prime == 0:
            n //= prime
            factors[prime] = factors.get(prime, 0) + 1
        if prime * prime > n:
            break
    if n >= 3000**2:
        raise NoValue("too large a number under a root")
    return factors if n == 1 else factors | {n: 1}


# ---------------------------------------------------------------- values


class Value:
    """Holds a quotient of two polynomials; its arithmetic spends from the budget."""

    def __init__(self, budget: Budget, numerator: dict, denominator: dict = ONE):
        if not denominator:
            raise NoValue("division by zero")
        if len(denominator) == 1 and denominator != ONE:
            ((monomial, coefficient),) = denominator.items()
            inverse = {tuple((atom, -exponent) for atom, exponent in monomial): 1 / coefficient}
            numerator = times(numerator, inverse, budget)
            denominator = ONE
        self.budget = budget
        self.numerator = numerator
        self.denominator = denominator

    def __neg__(self):
        return self * number(-1, self.budget)

    def __add__(self, other):
        left = times(self.numerator, other.denominator, self.budget)
        right = times(other.numerator, self.denominator, self.budget)
        denominator = times(self.denominator, other.denominator, self.budget)
        return Value(self.budget, plus(left, right), denominator)

    def __mul__(self, other):
        numerator = times(self.numerator, other.numerator, self.budget)
        denominator = times(self.denominator, other.denominator, self.budget)
        return Value(self.budget, numerator, denominator)

    def __truediv__(self, other):
        return self * Value(self.budget, other.denominator, other.numerator)

    def __eq__(self, other):
        left = times(self.numerator, other.denominator, self.budget)
        return left == times(other.numerator, self.denominator, self.budget)

    def __pow__(self, exponent):
        """Return b^(k s + c) as (b^s)^k b^c, with an atom for b^s if s is no number."""
        if exponent.denominator != ONE:
            return symbol(f"({self})^({exponent})", self.budget)
        result = number(1, self.budget)
        for monomial, coefficient in exponent.numerator.items():
            if monomial == ():
                result *= self.rational_power(coefficient)
            else:
                s = Value(self.budget, {monomial: Fraction(1)})
                result *= symbol(f"({self})^({s})", self.budget, coefficient)
        return result

    def rational_power(self, p: Fraction):
        """Return self ^ p; it becomes an atom if nothing simpler is known."""
        if not self.numerator and p > 0:
            return number(0, self.budget)
        limit = 512 if len(self.numerator) + len(self.denominator) == 2 else 64
        if p.denominator == 1 and abs(p) <= limit:
            result = number(1, self.budget)
            for _ in range(abs(int(p))):
                result = result * self if p > 0 else result / self
            return result
        if len(self.numerator) == 1 and self.denominator == ONE and p.denominator > 1:
            return self.root(p)
        return symbol(str(self), self.budget, p)

    def root(self, p: Fraction):
        """Return a single term to the power p, a fraction; odd roots of negatives are real."""
        ((monomial, coefficient),) = self.numerator.items()
        if -1 in dict(monomial):
            raise NoValue("a root of an imaginary number")
        powers = {atom: exponent * p for atom, exponent in monomial}
        sign = 1
        if coefficient < 0 and p.denominator % 2 == 0:
            powers[-1] = p
        elif coefficient < 0:
            sign = (-1) ** p.numerator
        for n, side in ((abs(coefficient.numerator), p), (coefficient.denominator, -p)):
            for prime, count in factorise(n, self.budget).items():
                powers[prime] = powers.get(prime, 0) + count * side
        product = {tuple(powers.items()): sign}
        return Value(self.budget, times(product, ONE, self.budget))

    def __str__(self):
        """Return one text whatever the order of the terms; atoms are named by it."""
        sums = []
        for polynomial in (self.numerator, self.denominator):
            terms = []
            for monomial, coefficient in polynomial.items():
                powers = "".join(f"*({atom})^{exponent}" for atom, exponent in monomial)
                terms.append(f"{coefficient}{powers}")
            sums.append("+".join(sorted(terms)))
        text = "/".join(sums)
        if len(text) > 1000:
            raise NoValue("too long")
        return text

    def rational(self):
        """Return the rational number that this value is, else None."""
        if self.denominator != ONE or self.numerator.keys() - {()}:
            return None
        return self.numerator.get((), 0)

    def natural(self):
        """Return the whole number from 0 to 100 that this value is, else None."""
        n = self.rational()
        return int(n) if n in range(101) else None


def number(n, budget: Budget) -> Value:
    """Return a whole number, a fraction, or a text like 1.5 or 1/2 as a value."""
    return Value(budget, plus({(): Fraction(n)}, {}))


def symbol(name: str, budget: Budget, exponent=1) -> Value:
    return Value(budget, {((name, exponent),): Fraction(1)})


# ---------------------------------------------------------------- reading

BRACKETS = {"(": ")", "{": "}", "[": "]", "|": "|"}
ENDS = {"end", "+", "-", ")", "]", "}"}  # tokens that end a product
DIGITS = set("0123456789.")
FUNCTIONS = set(
    r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \log \ln \exp".split()
)
# Any other command takes what follows as its argument, like a function.
SYMBOLS = set(
    r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa "
    r"\lambda \mu \nu \xi \pi \rho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \Gamma "
    r"\Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega \infty \emptyset \ell "
    r"\ldots \dots \cdots".split()
)


def read_value(text: str, budget: Budget) -> Value:
    """Return the value of a normalised text; raises NoValue if it is no expression."""
    reader = Reader(text, budget)
    value = reader.sum()
    if reader.token != "end":
        raise NoValue("the text goes on")
    return value


class Reader:
    """Reads a sum of products of powers of atoms by recursive descent.

    Each method from `sum` on reads what it is named after and returns its Value.
    """

    def __init__(self, text: str, budget: Budget):
        self.tokens = [token for token in TOKEN.findall(text) if not token.isspace()] + ["end"]
        self.position = 0
        self.depth = 0
        self.in_bars = False  # inside |...|, where the next | closes
        self.budget = budget

    @property
    def token(self):
        return self.tokens[self.position]

    def take(self):
        """Return the next token and move past it."""
        token = self.token
        if token == "end":
            raise NoValue("the text ends too early")
        self.position += 1
        return token

    def skip(self, token):
        """Move past the next token if it is this one; return whether it was."""
        is_next = self.token == token
        self.position += is_next
        return is_next

    def number(self, n):
        return number(n, self.budget)

    def symbol(self, name):
        return symbol(name, self.budget)

    def sum(self):
        total = self.signed(self.product)
        while self.token in ("+", "-"):
            total += self.signed(self.product)
        return total

    def signed(self, read):
        """Read plus and minus signs, then what `read` reads."""
        is_negative = False
        while self.token in ("+", "-"):
            is_negative ^= self.take() == "-"
        return -read() if is_negative else read()

    def at_end(self):
        return self.token in ENDS or (self.token == "|" and self.in_bars)

    def product(self, ends=frozenset()):
        """Read factors side by side, or joined by * and /, up to one of `ends` at the latest."""
        result = self.power()
        while not self.at_end() and self.token not in ends:
            if self.skip("/"):
                result /= self.signed(self.power)
            else:
                result *= self.factor()
        return result

    def factor(self):
        """Read a further factor of a product."""
        if self.skip("*"):
            return self.signed(self.power)
        if self.token[0] == '"':
            return self.unit()
        last = self.tokens[self.position - 1]
        second_last = self.tokens[self.position - 2]
        if self.token[0] in DIGITS and last[0] in DIGITS and second_last != "^":
            raise NoValue("two numbers side by side")  # 2 3 is no product, but 2^6 3^5 is one
        return self.power()

    def unit(self):
        """Read words at the end of a product: 9 km/h is 9, 3 cm^2 is 3, 5 million is 5000000."""
        zeros = 0
        while self.token[0] == '"':
            phrase = self.take().strip('" ').lower()
            if not re.fullmatch(r"[a-z./ ]*", phrase):
                raise NoValue("no unit")
            zeros += sum(SCALES.get(word, 0) for word in phrase.split())
            if self.skip("^"):
                self.argument()
            if self.token in ("/", "*") and self.tokens[self.position + 1][0] == '"':
                self.take()
        if not self.at_end():
            raise NoValue("a word within a product")
        return self.number(10**zeros)

    def power(self):
        """Read an atom and its exponents, factorials and primes."""
        base = self.atom()
        while self.token in ("^", "!", "'"):
            mark = self.take()
            n = base.natural()
            if mark == "^":
                base **= self.argument()
            elif mark == "!" and n is not None:
                base = self.number(math.factorial(n))
            else:
                base = self.symbol(f"({base}){mark}")
        return base

    def argument(self):
        """Read what follows ^ or a command: a group, or a single atom."""
        return self.signed(self.atom)

    def atom(self):
        self.depth += 1
        if self.depth > 20:
            raise NoValue("too deep")
        token = self.take()
        if token in BRACKETS:
            value = self.brackets(token)
        elif token == r"\frac":
            value = self.argument() / self.argument()
        elif token == r"\binom":
            value = self.binomial()
        elif token == r"\sqrt":
            degree = self.atom() if self.token == "[" else self.number(2)
            value = self.argument() ** (self.number(1) / degree)
        elif token[0] in DIGITS:
            if len(token) > 60 or token == ".":
                raise NoValue("no number, or too long")
            value = self.number(token)
        elif token[0].isalpha() or token[0] == '"' or token in SYMBOLS:
            value = self.variable(token)
        elif token[0] == "\\" and len(token) > 2:
            value = self.function(token)
        else:
            raise NoValue("unexpected token")
        self.depth -= 1
        return value

    def brackets(self, opening):
        """Read a sum and its closing bracket; between | and | its absolute value."""
        outside = self.in_bars
        self.in_bars = opening == "|"
        value = self.sum()
        if not self.skip(BRACKETS[opening]):
            raise NoValue("unexpected token")
        self.in_bars = outside
        if opening != "|":
            return value
        n = value.rational()
        if n is not None:
            return self.number(abs(n))
        return self.symbol(f"|{min(str(value), str(-value))}|")

    def binomial(self):
        top = self.argument()
        bottom = self.argument()
        n = top.natural()
        k = bottom.natural()
        if n is None or k is None:
            return self.symbol(f"({top}over{bottom})")
        return self.number(math.comb(n, k))

    def variable(self, token):
        name = token.strip('" ')
        if len(name) > 3 and token not in SYMBOLS:
            name = name.lower()
        name += self.subscript()
        if name == "i":
            return self.number(-1) ** self.number("1/2")
        return self.symbol(name)

    def subscript(self):
        """Read a subscript as it stands; return "" if there is none."""
        if not self.skip("_"):
            return ""
        text = ""
        depth = 0
        while text == "" or depth != 0:
            token = self.take()
            depth += (token == "{") - (token == "}")
            text += token
        return "_" + text.strip("{}")

    def function(self, name):
        """Read a function's subscript, exponent and argument; f^{-1} is the inverse function."""
        exponent = self.number(1)
        while self.token in ("_", "^"):
            name += self.subscript()
            if self.skip("^"):
                exponent = self.argument()
        if self.token in ("(", "{"):
            argument = self.atom()
        else:
            argument = self.product(ends={"*", "/", *FUNCTIONS})  # \sin 2x \cos y
        if exponent.rational() == -1 and name in FUNCTIONS:
            name = name.replace("\\", r"\arc")
            exponent = self.number(1)
        return self.symbol(f"{name}({argument})") ** exponent
