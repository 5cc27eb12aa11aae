r"""Is an answer a formula of the question, only spelt in another way?

    Compute $55^2 - 45^2$        -45^{2}+0+55^2        a copy: nothing was computed
    Factor $x^2 + 5x + 6$        (x+2)(x+3)            no copy

The shape of an expression is how it is put together. The order of sums and products does not count,
and neither do brackets, neutral elements (0 + x, 1 x) and what cancels (x - x, x / x). No number is
computed: 2 + 3 has another shape than 5. An answer with the shape of a formula of the question was
not worked out. Next to read: spelling.py.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from checkers.answers import unmarked
from checkers.expressions import ONE, Algebra, Unreadable, equal, numbers, read_all
from checkers.spelling import tidy

ZERO = Fraction(0)
PLAIN = re.compile(r"[\s({]*-?\s*(?:\\?[A-Za-z]+(?:_\w)?|[\d.]+(?:_\w+)?)[\s)}]*")  # 5, x, \pi
SHAPELESS = re.compile(r"\\begin|\\cup|\\cap|[∪∩]")
CHUNK = re.compile(r"[,;∨=<>≤≥≠≈:&¶⦃⦄]|\\(?:cup|cap|in)(?![a-z])|«[^»]*»")


@dataclass(frozen=True)
class Shape:
    """A sum, product, power, function or variable of parts, which are shapes or numbers."""

    kind: str
    parts: tuple

    def __neg__(self):
        if self.kind == "+":
            return sum_of([-term for term in self.parts])
        return multiply(-ONE, self)


def parts_of(x, kind: str) -> tuple:
    return x.parts if isinstance(x, Shape) and x.kind == kind else (x,)


def joined(kind: str, parts: list, neutral: Fraction):
    if len(parts) < 2:
        return parts[0] if parts else neutral
    return Shape(kind, tuple(sorted(parts, key=repr)))


def sum_of(terms: list):
    kept = []
    for term in terms:
        if -term in kept:
            kept.remove(-term)
        elif term != 0:
            kept.append(term)
    return joined("+", kept, ZERO)


def add(x, y):
    return sum_of([*parts_of(x, "+"), *parts_of(y, "+")])


def multiply(x, y):
    """A product, in which order does not count; equal factors that are no numbers are one power."""
    factors = [*parts_of(x, "*"), *parts_of(y, "*")]
    if ZERO in factors:
        return ZERO
    below = [isinstance(factor, Fraction) and factor < 0 for factor in factors]
    negative, powers = sum(below) % 2, Counter()
    for factor in (-f if minus else f for f, minus in zip(factors, below, strict=True)):
        base, exponent = factor.parts if is_power(factor) else (factor, ONE)
        if isinstance(exponent, Fraction) and not isinstance(base, Fraction):
            powers[base] += exponent
        else:
            powers[factor] += 1
    kept = [power(base, exponent) for base, exponent in powers.items()]
    kept = [factor for factor in kept if factor != 1]
    if negative and len(kept) == 1 and isinstance(kept[0], Fraction):
        return -kept[0]
    return joined("*", [-ONE] * negative + kept, ONE)


def is_power(x) -> bool:
    return isinstance(x, Shape) and x.kind == "^"


def divide(x, y):
    if y == 0:
        raise Unreadable("divided by zero")
    inverses = [power(factor, -ONE) for factor in parts_of(y, "*")]
    for inverse in inverses:
        x = multiply(x, inverse)
    return x


def power(x, exponent):
    if is_power(exponent) and exponent.parts[1] == -1 and isinstance(exponent.parts[0], Fraction):
        exponent = 1 / exponent.parts[0]  # a root
    if exponent == 0 or x == 1:
        return ONE
    if exponent == 1:
        return x
    if exponent == -1 and isinstance(x, Fraction) and x != 0:
        return 1 / x if x.numerator in (1, -1) else Shape("^", (x, exponent))
    if is_power(x) and exponent == -1:
        return power(x.parts[0], -x.parts[1])
    return Shape("^", (x, exponent))


def apply(name: str, x):
    if name == "log":
        return divide(apply("ln", x), apply("ln", Fraction(10)))
    return Shape("apply", (name, x))


def function(name: str):
    return lambda *arguments, **settings: Shape(name, (*arguments, *settings.values()))


SHAPES = Algebra(
    add=add,
    multiply=multiply,
    divide=divide,
    power=power,
    factorial=function("!"),
    binomial=function("binomial"),
    floor_or_ceiling=function("floor_or_ceiling"),
    magnitude=function("magnitude"),
    apply=apply,
    variable=lambda name: Shape("variable", (name,)),
)


def readings(text: str) -> list[tuple[str, list[tuple]]]:
    """Each item and side of a text, with (shape, value) of its expressions and terms.

    The whole item or side is the last of these. Variables have their values at the first point.
    """
    found = []
    for chunk in CHUNK.split(tidy(text)):
        for spelt in (unmarked(chunk), chunk.strip("()[]{} ")):
            try:
                both = [read_all(spelt, algebra, sign=1).parts for algebra in (SHAPES, numbers(0))]
                found.append((spelt, [*zip(*both, strict=True)]))
                break
            except (ValueError, ArithmeticError, TypeError):
                continue
    return found


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", tidy(text))


def is_copy(stated: str, gold: str, question: list[str]) -> bool:
    """Are the shapes of the stated answer those of the question, and not of the gold answer?

    One part is enough if it is worth the answer, as in 2 (55^2 - 45^2) / 2. Plain numbers and names
    are no copies. Matrices and unions of sets have no shape: they are compared letter by letter.
    """
    letters = squeezed(stated) if SHAPELESS.search(stated) else ""
    if letters and letters != squeezed(gold) and letters in map(squeezed, question):
        return True
    asked = {part[0] for formula in question for _, parts in readings(formula) for part in parts}
    known, answers = readings(gold), readings(stated)
    own = {part[0] for _, parts in known for part in parts}
    whole = {parts[-1][0] for spelt, parts in answers if not PLAIN.fullmatch(spelt)}
    if whole and whole <= asked and not whole <= own:
        return True
    worth = [parts[-1][1] for _, parts in known]
    copied = [part for _, parts in answers for part in parts if part[0] in asked - own]
    return any(
        isinstance(shape, Shape) and shape.kind != "variable" and equal(value, other)
        for shape, value in copied
        for other in worth
    )
