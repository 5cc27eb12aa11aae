r"""What is an expression worth? LaTeX or ASCII, read by recursive descent straight into a number.

    \frac{2}{4}, 2/4, 0.5        Fraction(1, 2): rational numbers are exact
    3\sqrt{2} - \pi              a complex number of 70 digits
    x^2 - 1, (x-1)(x+1)          seven numbers each: variables get fixed random values at
                                 seven points; expressions are equal if their numbers are

The texts were written by a model that is paid for being right. So nothing is ever evaluated as
code, and length, depth, powers and factorials have bounds. What cannot be read, or has no value,
raises `Unreadable`; 1/0 raises ZeroDivisionError. The functions keep no state, so any thread may
call them. Next to read: spelling.py.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from zlib import crc32

from mpmath import MPContext, libmp  # comes with sympy

MP = MPContext()
MP.dps = 70
CLOSE = MP.mpf(10) ** -55  # relative; equal values differ by rounding alone
ZERO = MP.mpf(10) ** -62  # relative; a smaller sum is the rounding of equal numbers that cancel
LARGEST, SMALLEST = MP.mpf(10) ** 100_000, MP.mpf(10) ** -100_000  # of inexact numbers
# The largest numerator or denominator of a rational that may equal an irrational number: a rational
# with larger ones can come as near as CLOSE by luck.
TALLEST = 10**25
BITS, FACTORIAL, DEPTH = 2**15, 2500, 40  # size of a rational, n of n!, nesting
EFFORT, POWER_EFFORT, FACTORIAL_EFFORT = 128, 4, 16  # of a text at most; of one; a product: 1
SIZES = (1, 20, 4000, 1, 20, 1, 4000)  # of variables at the points where they are compared
PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069)  # no small multiple of x is whole
for constant in (libmp.pi_fixed, libmp.e_fixed, libmp.ln2_fixed, libmp.ln10_fixed):
    constant(1000)  # fills its cache now, since threads must not do it at the same time

Number = Fraction | MP.mpc
ONE, HALF = Fraction(1), Fraction(1, 2)


class Unreadable(ValueError):
    """Not an expression, not a number, or too large."""


# --- 1. Numbers -------------------------------------------------------------------------------


def within_bounds(z) -> Number:
    """The number itself; Unreadable if it is not finite, or too large or too small."""
    if isinstance(z, Fraction):
        if max(z.numerator.bit_length(), z.denominator.bit_length()) > BITS:
            raise Unreadable("too large")
        return z
    if not MP.isfinite(z):
        raise Unreadable("no finite number")
    if z == 0:
        return Fraction(0)
    if not SMALLEST < abs(z) < LARGEST:
        raise Unreadable("too large or too small")
    return MP.mpc(z)


def inexact(x: Number):
    if not isinstance(x, Fraction):
        return x
    return MP.mpc(x.numerator) / x.denominator


def is_real(x: Number) -> bool:
    return isinstance(x, Fraction) or abs(x.imag) <= CLOSE * abs(x)


def equal(x: Number, y: Number) -> bool:
    """Are they the same number? A rational with many digits never equals an irrational number."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    for z in (x, y):
        if isinstance(z, Fraction) and max(abs(z.numerator), z.denominator) > TALLEST:
            return False
    x, y = inexact(x), inexact(y)
    return abs(x - y) <= CLOSE * max(abs(x), abs(y))


def below(x: Number, y: Number) -> bool:
    """Is the real number x less than y?"""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x < y
    return not equal(x, y) and inexact(x).real < inexact(y).real


def add(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return within_bounds(x + y)
    x, y = inexact(x), inexact(y)
    total, larger = x + y, max(abs(x), abs(y))
    if abs(total) <= ZERO * larger:
        return Fraction(0)
    if min(abs(total), abs(x) or larger, abs(y) or larger) < CLOSE * larger:
        raise Unreadable("so unlike in size that digits are lost")
    return within_bounds(total)


def multiply(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return within_bounds(x * y)
    return within_bounds(inexact(x) * inexact(y))


def divide(x: Number, y: Number) -> Number:
    return multiply(x, 1 / y)  # ZeroDivisionError where y is 0


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent; odd roots of negative numbers are real, as in school."""
    if base == 0 and (
        exponent == 0
        or not isinstance(exponent, Fraction)
        or exponent.numerator > 1 < exponent.denominator
    ):
        raise Unreadable("0 ** 0, or 0 ** x")
    if isinstance(exponent, Fraction):
        whole, root = exponent.numerator, exponent.denominator
        if isinstance(base, Fraction):
            exact = exact_root(base, root)
            if exact is not None:
                bits = max(exact.numerator.bit_length(), exact.denominator.bit_length())
                if bits * abs(whole) > 2 * BITS and exact not in (0, 1, -1):
                    raise Unreadable("too large a power")
                return within_bounds(exact**whole)
        if root > 1 and root % 2 and is_real(base) and inexact(base).real < 0:
            positive = power(-base, exponent)
            return positive if whole % 2 == 0 else -positive
    if abs(inexact(exponent)) > FACTORIAL or base == 0:
        raise Unreadable("too large a power")
    return within_bounds(MP.exp(inexact(exponent) * MP.ln(inexact(base))))


def exact_root(x: Fraction, degree: int) -> Fraction | None:
    """The rational whose `degree`-th power is x, or None."""
    if degree == 1:
        return x
    if degree > 100 or (x < 0 and degree % 2 == 0):
        return None
    from sympy import integer_nthroot  # slow to import: --help does not wait for it

    roots = [integer_nthroot(n, degree) for n in (abs(x.numerator), x.denominator)]
    if not all(is_exact for _, is_exact in roots):
        return None
    return Fraction(roots[0][0], roots[1][0]) * (-1 if x < 0 else 1)


def factorial(n: Number) -> Number:
    """n!; for a variable, whose value is no whole number, the gamma function at n + 1."""
    if not isinstance(n, Fraction) or abs(n) > 30_000:
        raise Unreadable("no factorial")
    if n.denominator == 1:
        if not 0 <= n <= FACTORIAL:
            raise Unreadable("no factorial, or too large a one")
        return Fraction(math.factorial(int(n)))
    return within_bounds(MP.mpc(MP.gamma(inexact(n + 1).real)))


def binomial(n: Number, k: Number) -> Number:
    return divide(factorial(n), multiply(factorial(k), factorial(add(n, -k))))


def floor_or_ceiling(x: Number, up: bool) -> Fraction:
    if not is_real(x):
        raise Unreadable("no real number")
    if isinstance(x, Fraction):
        return Fraction(math.ceil(x) if up else math.floor(x))
    near = int(MP.nint(x.real))
    if equal(x, Fraction(near)):
        return Fraction(near)
    return Fraction(int(MP.ceil(x.real) if up else MP.floor(x.real)))


def magnitude(x: Number) -> Number:
    return abs(x) if isinstance(x, Fraction) else within_bounds(MP.mpc(abs(x)))


# Only functions that leave MP's precision as it is: others raise it for a while, in all threads.
FUNCTIONS = {
    **{name: getattr(MP, name) for name in ("sin", "cos", "tan", "exp", "ln")},
    **{f"arc{name}": getattr(MP, f"a{name}") for name in ("sin", "cos", "tan")},
    "sec": lambda x: 1 / MP.cos(x),
    "csc": lambda x: 1 / MP.sin(x),
    "cot": lambda x: MP.cos(x) / MP.sin(x),
    "log": lambda x: MP.ln(x) / MP.ln(10),
}


def apply(name: str, x: Number) -> Number:
    value = FUNCTIONS[name](inexact(x))
    if name in ("sin", "cos", "tan") and abs(value) < CLOSE:
        return Fraction(0)  # sin π is 0, apart from rounding
    if name == "arctan" and abs(x) > 10**20:
        raise Unreadable("too near to pi/2")
    if name in ("tan", "sec", "csc", "cot") and abs(value) > 10**40:
        raise Unreadable("a pole")
    return within_bounds(value)


def variable(name: str, point: int) -> Fraction:
    """The value of a variable at a point, which is the same in every expression.

    All variables are positive at the first point and negative at the last one. At some point in
    between, any two letters have unlike signs, so that |xy| differs from xy.
    """
    signs = ord(name) if len(name) == 1 else crc32(name.encode())
    last = len(SIZES) - 1
    negative = point == last or (point > 0 and signs >> (point - 1) & 1)
    number = crc32(f"{name} at {point}".encode())
    value = SIZES[point] * Fraction(10_000 + number % 40_000, PRIMES[point])
    return -value if negative else value


@dataclass(frozen=True)
class Algebra:
    """What a Reader makes of sums, products and so on, and of variables."""

    add: Callable
    multiply: Callable
    divide: Callable
    power: Callable
    factorial: Callable
    binomial: Callable
    floor_or_ceiling: Callable
    magnitude: Callable
    apply: Callable
    variable: Callable


def numbers(point: int) -> Algebra:
    """The algebra of numbers, in which variables have their values at a point."""
    functions = (
        add,
        multiply,
        divide,
        power,
        factorial,
        binomial,
        floor_or_ceiling,
        magnitude,
        apply,
    )
    return Algebra(*functions, variable=partial(variable, point=point))


# --- 2. Reading -------------------------------------------------------------------------------

SPACE, NOTHING = re.compile(r"\s*"), re.compile(r"\Z")
DIGIT, LETTER, COMMAND = re.compile("[0-9]"), re.compile("[A-Za-z]"), re.compile(r"\\([a-z]+)")
NUMBER = re.compile(r"[0-9]|\.[0-9]|\.\\(?:overline|bar)")
ARGUMENT = re.compile(r"[{A-Za-z\\(]")
SIGN = re.compile(r"[-+](?!\s*[-+]\s*[-+])")  # 1 - -2 is read, 1 - - -2 is not
RAISED = re.compile(r"\^|\*\*")
FACTOR_OF_ARGUMENT = re.compile(r"[A-Za-z]|\\(?:pi|frac|sqrt)(?![A-Za-z])")
LITERALS = re.compile(r"(\d+)?(?:\.(\d+)?(?:\\(?:overline|bar)\s*\{?(\d+)\}?)?)?", re.ASCII)
EXPONENT = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
SUBSCRIPT = re.compile(r"_(?:\{\s*([\w+-]+)\s*\}|(\w))", re.ASCII)
ENDED = re.compile(r"(?:!|\}|\^\s*\w|\\sqrt\s*\d|\\pi)\s+$|!$")  # where a digit begins a factor
DIGITS = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
MIXED = re.compile(rf"\s*\\frac{DIGITS}{DIGITS}|\s+(\d+)/(\d+)", re.ASCII)
DEGREE = re.compile(r"\^\s*\{\s*\\circ\s*\}|\^?\s*\\(?:circ|degree)(?![A-Za-z])")
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
TIMES = re.compile(r"\*(?!\*)|\\(?:cdot|times|ast)(?![A-Za-z])")
DIVIDE = re.compile(r"/|\\div(?![A-Za-z])")
GREEK = re.compile(
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho"
    r"|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell)"
    r"(?![A-Za-z])"
)
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
STARTS = re.compile(
    rf"[A-Za-z({{\[]|\\(?:frac|sqrt|binom|pi|lfloor|lceil|{'|'.join(FUNCTIONS)})(?![A-Za-z])"
)


@cache
def literal(text: str) -> re.Pattern:
    """The pattern of a literal text; after a command, no further letter may follow."""
    return re.compile(re.escape(text) + ("(?![A-Za-z])" if text[-1].isalpha() else ""))


class Reader:
    """One pass over a text.

    algebra: makes numbers of sums, products and so on here, and shapes in shapes.py.
    sign: 1 reads \\pm as +, -1 reads it as -, 0 refuses it.
    parts: what the algebra made of each term and expression; the whole is the last.
    names: the variables that were read.
    """

    def __init__(self, text: str, algebra: Algebra, sign: int):
        self.text, self.algebra, self.sign, self.parts = text, algebra, sign, []
        self.at, self.depth, self.bars, self.degrees, self.effort = 0, 0, False, None, 0
        self.names: set[str] = set()
        self.tall = self.irrational = False

    def weigh(self, value: Number, known: int) -> None:
        """Count the effort of a large rational, and note a constant of very many digits.

        Such a constant may come near any number, so it may not stand beside an irrational one.
        known: how many variables there were before the value; a constant adds none.
        """
        if isinstance(value, Fraction):
            height = max(abs(value.numerator), value.denominator)
            self.spend(height.bit_length() >> 9)
            self.tall = self.tall or (height > TALLEST and known == len(self.names))

    def take(self, pattern) -> re.Match | None:
        """Skip spaces and read what the pattern (compiled, or literal text) matches next."""
        self.at = SPACE.match(self.text, self.at).end()
        pattern = literal(pattern) if isinstance(pattern, str) else pattern
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def sees(self, pattern) -> bool:
        at, found = self.at, self.take(pattern)
        self.at = at
        return found is not None

    def expression(self) -> Number:
        """term ± term ± ..."""
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("too deep")
        known = len(self.names)
        total = self.term()
        while True:
            if self.take("+"):
                total = self.algebra.add(total, self.term())
            elif self.take("-"):
                total = self.algebra.add(total, -self.term())
            elif found := self.take(PLUS_MINUS):
                total = self.algebra.add(total, self.plus_minus(found, self.term()))
            else:
                self.depth -= 1
                self.parts.append(total)
                return total
            self.weigh(total, known)

    def term(self) -> Number:
        """Factors, multiplied, divided or side by side; a / b c is (a / b) c."""
        known = len(self.names)
        product = self.signed()
        while True:
            self.spend(1)
            self.weigh(product, known)
            if self.take(TIMES):
                product = self.algebra.multiply(product, self.signed())
            elif self.take(DIVIDE):
                product = self.algebra.divide(product, self.signed())
            elif self.begins_factor():
                product = self.algebra.multiply(product, self.power())
            else:
                self.parts.append(product)
                return product

    def begins_factor(self) -> bool:
        """Does a factor follow without a sign? A digit may, after a power or the like: 2^4 5^2."""
        if self.sees("|"):
            return not self.bars
        if self.sees(DIGIT):
            return bool(ENDED.search(self.text[: SPACE.match(self.text, self.at).end()]))
        return self.sees(STARTS) or self.sees(GREEK)

    def signed(self) -> Number:
        if found := self.take(SIGN):
            return -self.signed() if found[0] == "-" else self.signed()
        if found := self.take(PLUS_MINUS):
            return self.plus_minus(found, self.signed())
        return self.power()

    def plus_minus(self, found: re.Match, value: Number) -> Number:
        if not self.sign:
            raise Unreadable("a plus-minus sign where one value is needed")
        return value if (found[0] == r"\pm") == (self.sign > 0) else -value

    def power(self) -> Number:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("too deep")
        base = self.postfixed()
        if self.take(RAISED):
            self.spend(POWER_EFFORT)
            base = self.algebra.power(base, self.exponent())
            self.irrational = self.irrational or not isinstance(base, Fraction)
        self.depth -= 1
        return base

    def exponent(self) -> Number:
        """What stands after ^, up to the next factor."""
        minus = self.take("-")
        digits = self.take(EXPONENT)
        value = Fraction(digits[0]) if digits else self.primary()
        if self.take(RAISED):
            value = self.algebra.power(value, self.exponent())
        return -value if minus else value

    def postfixed(self) -> Number:
        """A primary with its factorials; a degree sign may stand only in a function's argument."""
        value = self.primary()
        while True:
            if self.take(DEGREE):
                if self.degrees is None:
                    raise Unreadable("a degree sign within an expression")
                self.degrees = True
            elif self.take("!"):
                self.spend(FACTORIAL_EFFORT)
                value = self.algebra.factorial(value)
            else:
                return value

    def primary(self) -> Number:
        for opening in CLOSING:
            if self.take(opening):
                return self.group(opening)
        if self.sees(NUMBER):
            return self.number()
        if found := self.take(GREEK):
            return self.named(found[0])
        return self.letters()

    def group(self, opening: str) -> Number:
        bars, self.bars = self.bars, opening == "|"
        value = self.expression()
        self.bars = bars
        if not self.take(CLOSING[opening]):
            raise Unreadable("not closed")
        if opening == "|":
            return self.algebra.magnitude(value)
        if opening.startswith("\\"):
            return self.algebra.floor_or_ceiling(value, up=opening == r"\lceil")
        return value

    def argument(self) -> Number:
        """What a command takes: a group in braces, or one digit, letter or command."""
        if digit := self.take(DIGIT):
            return Fraction(int(digit[0]))
        if not self.sees(ARGUMENT):
            raise Unreadable("no argument")
        return self.primary()

    def spend(self, effort: int) -> None:
        """Count operations, which cost time: an answer has a few, an attack has hundreds."""
        self.effort += effort
        if self.effort > EFFORT:
            raise Unreadable("too many operations")

    def binomial(self) -> Number:
        self.spend(3 * FACTORIAL_EFFORT)
        return self.algebra.binomial(self.argument(), self.argument())

    def constant(self, value) -> Number:
        self.irrational = True
        return MP.mpc(value)

    def root(self) -> Number:
        self.spend(POWER_EFFORT)
        degree = self.group("[") if self.take("[") else Fraction(2)
        if not isinstance(degree, Fraction) or degree.denominator != 1 or degree < 2:
            raise Unreadable("no root")
        value = self.algebra.power(self.argument(), 1 / degree)
        self.irrational = self.irrational or not isinstance(value, Fraction)
        return value

    def number(self) -> Fraction:
        """12, 0.5, .5, 0.\\overline{3}, or a mixed number: 2\\frac{1}{4}, 2 1/4."""
        found = self.take(LITERALS)
        whole, decimals, repeated = (part or "" for part in found.groups())
        if self.sees("_"):
            raise Unreadable("a base within an expression")
        value = Fraction(int(whole + decimals or 0), 10 ** len(decimals))
        if repeated:
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
        mixed = MIXED.match(self.text, self.at) if found[0] == whole else None
        if mixed:
            self.at = mixed.end()
            above, under = (int(part) for part in mixed.groups() if part)
            if not 0 < above < under:
                raise Unreadable("neither a mixed number nor a product")
            value += Fraction(above, under)
        return value

    def letters(self) -> Number:
        """A command, a function with its argument, i, e, or a variable with its subscript."""
        if found := self.take(COMMAND):
            if found[1] in FUNCTIONS:
                return self.function(found[1])
            if found[1] == "frac":
                return self.algebra.divide(self.argument(), self.argument())
            if found[1] in ("sqrt", "binom"):
                return self.root() if found[1] == "sqrt" else self.binomial()
            if found[1] == "pi":
                return self.constant(MP.pi)
            raise Unreadable("unknown command")
        found = self.take(LETTER)
        if not found:
            raise Unreadable("no expression")
        return self.named(found[0])

    def named(self, name: str) -> Number:
        subscript = self.take(SUBSCRIPT)
        if subscript:
            name += "_" + (subscript[1] or subscript[2])
        elif name == "i":
            return self.constant(1j)
        elif name in "fg" and self.take("("):
            self.names.add(name)  # f(2) and f(1 + 1) are one variable, f(3) is another
            return self.algebra.variable(f"{name}({describe(self.group('('))})")
        elif name == "e":
            return self.constant(MP.e)
        self.names.add(name)
        return self.algebra.variable(name)

    def function(self, name: str) -> Number:
        """sin x, sin^2 x, sin^{-1} x, sin 5x, sin(x), log_2 8."""
        self.spend(POWER_EFFORT)
        exponent, base = Fraction(1), None
        if self.take("^"):
            exponent = self.argument() if not self.take("-") else -self.argument()
        if self.take("_"):
            base = self.argument()
        if exponent == -1 and f"arc{name}" in FUNCTIONS:
            name, exponent = f"arc{name}", Fraction(1)
        self.irrational = True
        outside, self.degrees = self.degrees, False  # None outside of functions
        value = self.postfixed() if self.sees("(") else self.side_by_side()
        if self.degrees:
            value = self.algebra.multiply(value, within_bounds(MP.mpc(MP.pi) / 180))
        self.degrees = outside
        result = self.algebra.apply("ln" if base is not None else name, value)
        if base is not None:
            result = self.algebra.divide(result, self.algebra.apply("ln", base))
        return self.algebra.power(result, exponent)

    def side_by_side(self) -> Number:
        """The argument of a function without parentheses: 5x in sin 5x cos x."""
        value = -self.power() if self.take("-") else self.power()
        while self.sees(FACTOR_OF_ARGUMENT) or self.sees(GREEK):
            value = self.algebra.multiply(value, self.power())
        return value


def describe(x) -> str:
    return MP.nstr(x, 40) if isinstance(x, MP.mpc) else str(x)


def read_all(text: str, algebra: Algebra, sign: int = 0) -> Reader:
    """The Reader of a whole text, whose last part is the whole expression; raises Unreadable."""
    reader = Reader(text, algebra, sign)
    reader.expression()
    if not reader.take(NOTHING):
        raise Unreadable("something follows")
    return reader


def read_value(text: str, point: int = 0, sign: int = 0) -> tuple[Number, set[str]]:
    """The value of a whole text at a point, and the variables in it; raises Unreadable."""
    reader = read_all(text, numbers(point), sign)
    value = reader.parts[-1]
    if reader.tall and reader.irrational:
        raise Unreadable("too many digits beside an irrational number")
    return value, reader.names


def read_values(text: str, sign: int = 0) -> tuple[Number | None, ...]:
    """One value if there are no variables, else one for each point, None where there is none."""
    first, names = read_value(text, 0, sign)
    values = [first]
    for point in range(1, len(SIZES)) if names else ():
        try:
            values.append(read_value(text, point, sign)[0])
        except (ValueError, ArithmeticError):
            values.append(None)
    return tuple(values)
