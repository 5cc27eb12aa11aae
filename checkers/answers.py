r"""What does an answer say? It is read into a structure of values; two structures are compared.

    "x = \frac{2}{4}"                    the value 1/2, with the name x
    "[0, 1) \cup \{3\}"                  a set of real numbers
    "5 \text{ or } 6"                    a list of two values
    "\text{(E)}", "e"                    a word

An answer is a value, word, list, tuple, set of real numbers, matrix, number in a base, ratio,
equation or inequality. `read` looks at the outermost signs first and then at the parts. `same`
compares two structures. What cannot be read raises `Unreadable`. Next to read: expressions.py.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise

from checkers import expressions as expr
from checkers.expressions import GREEK, ONE, Number, Unreadable, equal, read_value, read_values
from checkers.spelling import (
    NOUNS,
    NUMERALS,
    OPENING,
    SCALES,
    TWISTS,
    UNITS,
    closing_index,
    depths,
    tidy,
)

NESTED, LISTED, JOINED = 20, 32, 16  # at most: nested brackets; items; intervals, sides or rows

# --- 1. Structure -----------------------------------------------------------------------------


ENDS = (-math.inf, math.inf)
EVERYTHING = (-math.inf, False, math.inf, False)  # all real numbers, as an interval


@dataclass(frozen=True)
class Answer:
    """The structure of an answer.

    kind: value, word, list, tuple, reals, matrix, base, ratio, equation, inequality or chain.
    parts: what it is made of, which depends on the kind.
    name: the x of `x = 5` and of `x > 3`.
    unit: a known unit.
    marks: the brackets of a tuple or set, the sign of an inequality, the : of a time; of a list ±,
    ∨ or "named" (its items have several names).
    values: of `x = 5`, those of x - 5; of a word that may also be a product, those of the product.
    """

    kind: str
    parts: tuple
    name: str = ""
    unit: str = ""
    marks: str = ""
    values: tuple[Number, ...] = ()


RELATION = re.compile(r"[=<>≤≥≠≈]")
VARIABLE = re.compile(  # x, x_{n+1}, AB, and f(x), v(3), P(red)
    rf"\s*((?:{GREEK.pattern}|[A-Z]{{2,4}}|[A-Za-z])(?:_\w|_\{{[\w+-]+\}})?)\s*"
    r"|\s*((?:[d-wA-Z]|[xyz](?=\(t\)))(?:_\w|_\{\w+\})?(?:\^\{-1\})?)\s*"
    r"\(\s*(?!\2\s*\))(?:[A-Za-z0-9](?:\s*,\s*[A-Za-z0-9])*|\\theta|«[^»]*»)\s*\)\s*"
    r"|\s*\|\s*([A-Z]{2}|[a-wz])\s*\|\s*"
)
MEMBER = re.compile(r"([^=<>]*)\\in(?![a-zA-Z])")
MATRIX = re.compile(
    r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|\s]*\})?(.*?)\\end\s*\{\1\}",
    re.DOTALL,
)
BASE = re.compile(
    r"[({\s]*(-?(?:[0-9A-Z.]*\d[0-9A-Z]*|[A-Z]+))[)}\s]*_\s*\{?\(?\s*(\w+)\s*\)?\}?", re.ASCII
)  # matched without the « » of the text
POINT = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
CLOCK = re.compile(r"(?:[01]?\d|2[0-4])(?:\s*:\s*[0-5]\d){1,2}")
UNIT = re.compile(r"«[^»]*»(?:«[^»]*»|\^\{?[23]\}?|[\s/])*")
SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})", re.ASCII)
MARK = re.compile(r"\s*(?:\\%|%|\^\s*\{\s*\\circ\s*\}|\^?\s*\\(?:circ|degree))\s*\Z")
OPERATION = re.compile(r"(?<=[\w)}])\s*[-+*]|\\(?:cdot|times|pm|mp)")
READS_DEGREES = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)")
COSTLY = re.compile(r"\^|\\(?:pm|mp|sqrt)")
COSTLIER = re.compile(r"!|\\(?:binom|exp|ln|log|arc|sin|cos|tan|sec|csc|cot)")
MOST_COSTLY = 48  # powers and roots in an answer; a function counts as four. Attacks have hundreds
CONGRUENCE = re.compile(
    r"(?:([^=]*)\\equiv)?([^=]*?)[({\s]*(?:\\[pb]?mod|«mod»)\s*(\d+|{\d+})[)}\s]*"
)
EXCEPT = re.compile(r"«(?:[Aa]ll )?real numbers (?:except|but)»(.+)")
INFINITE = re.compile(r"([+-]?)\s*\\infty\s*")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def read_answer(text: str) -> Answer:
    """The structure of an answer; raises Unreadable, or another ValueError or ArithmeticError."""
    text = tidy(text)
    if len(COSTLY.findall(text)) + 4 * len(COSTLIER.findall(text)) > MOST_COSTLY:
        raise Unreadable("too many powers, roots, functions and factorials")
    return read(text)


def read(text: str, depth: int = 0) -> Answer:
    """The structure of a tidy text; raises Unreadable."""
    if depth > NESTED or not text.strip():
        raise Unreadable("empty, or too deep")
    for separators in (",;", "∨"):
        parts = at_most(split(text, separators), LISTED)
        if len(parts) > 1:
            return as_list([read(part, depth + 1) for part in parts], either=separators == "∨")
    return read_item(text.strip(), depth + 1)


def as_list(items: list[Answer], either: bool) -> Answer:
    """A list, in which order does not count; inequalities of one variable become one set."""
    names, kinds = {item.name for item in items}, {item.kind for item in items}
    one_name = len(names) == 1 and names != {""}
    if either and one_name and "reals" in kinds <= {"reals", "value"}:
        return Answer("reals", tuple(i for item in items for i in intervals(item)), names.pop())
    if either and kinds == {"tuple"} and any(item.marks != "()" for item in items):
        return Answer("reals", tuple(i for item in items for i in intervals(item)))
    if one_name and kinds == {"reals"} and (both := combine(all, *(item.parts for item in items))):
        return Answer("reals", both, names.pop())
    names -= {""}
    if len({re.sub(r"_.*", "", name) for name in names}) == 1:  # x = 2 or x = 3: two values
        items, names = [replace(item, name="") for item in items], set(list(names)[:1])
    if either and len(names) > 1:
        raise Unreadable("one name or another")
    flat = [i for item in items for i in (item.parts if item.marks in {"±", "∨"} else [item])]
    name = names.pop() if len(names) == 1 else ""
    return Answer("list", tuple(flat), name, marks="named" if names else "∨" if either else "")


def split(text: str, separators: str, within: bool = False) -> list[str]:
    """The parts of a text between separators that stand outside of brackets.

    1,000 is one number, unless the text comes from `within` brackets: (1,000) has two parts.
    """
    depth, grouped = depths(text), set() if within else thousands(text)
    if text and (min(depth) < 0 or depth[-1]):
        raise Unreadable("brackets do not match")
    cuts = [at for at, letter in enumerate(text) if letter in separators and not depth[at]]
    cuts = [-1, *(at for at in cuts if at not in grouped), len(text)]
    return [text[start + 1 : end] for start, end in pairwise(cuts)]


def thousands(text: str) -> set[int]:
    """Where commas group the digits of a number, as in 1,000 but not within (1,000)."""
    depth = depths(text, "([⦃", ")]⦄")
    spans = [range(*found.span()) for found in THOUSANDS.finditer(text)]
    return {at for span in spans for at in span if text[at] == "," and not depth[at]}


def read_item(text: str, depth: int) -> Answer:
    """The structure of one answer, found from its outermost signs."""
    if (found := MEMBER.match(text)) and VARIABLE.fullmatch(found[1]):
        members = read(text[found.end() :], depth)
        if members.kind not in ("reals", "tuple") and members.marks != "⦃⦄":
            raise Unreadable("no set to be in")
        return replace(members, name=found[1].strip())
    if found := INFINITE.fullmatch(text):
        return Answer("value", (-math.inf if found[1] == "-" else math.inf,))
    if found := CONGRUENCE.fullmatch(text):
        return read_congruence(*found.groups())
    if found := EXCEPT.fullmatch(text):
        return Answer(
            "reals", combine(first_alone, (EVERYTHING,), intervals(read(found[1], depth)))
        )
    if len(parts := split(re.sub(r"\\cup(?![a-zA-Z])", "∪", text), "∪")) > 1:
        return Answer("reals", at_most(i for part in at_most(parts) for i in set_of(part, depth)))
    if len(parts := split(re.sub(r"\\cap(?![a-zA-Z])", "∩", text), "∩")) > 1:
        return Answer("reals", combine(all, *(set_of(part, depth) for part in at_most(parts))))
    if len(parts := split(text, "∖")) == 2:
        return Answer(
            "reals", combine(first_alone, *(at_most(set_of(part, depth)) for part in parts))
        )
    if RELATION.search(MATRIX.sub("", text)):
        return read_relation(text, depth)
    if text[0] in OPENING and closing_index(text) == len(text) - 1:
        return read_bracketed(text, depth)
    if MATRIX.search(text):
        return Answer("matrix", read_matrices(text))
    found = BASE.fullmatch(re.sub(r"\s*[«»]\s*", "", text)) if "_" in text else None
    if found and (based := read_base(*found.groups())):
        return based
    if re.fullmatch(r"[A-Za-z]+", text):
        return read_letters(text)
    if "«" in text:
        return read_words(text, depth)
    if len(parts := split(text, ":")) > 1:
        marks = ":" if CLOCK.fullmatch(text) else ""
        return Answer("ratio", tuple(constant(part) for part in at_most(parts)), marks=marks)
    if found := SCIENTIFIC.fullmatch(text):
        text = f"{found[1]} \\cdot 10^{{{found[2]}}}"
    grouping = thousands(text)
    return read_number("".join(x for at, x in enumerate(text) if at not in grouping))


def at_most(parts, most: int = JOINED) -> tuple:
    """The parts; Unreadable if there are too many, since each may be compared with each."""
    parts = tuple(parts)
    if len(parts) > most:
        raise Unreadable("too many parts")
    return parts


def set_of(text: str, depth: int) -> tuple:
    """The intervals of one of the sets in a union, intersection or difference."""
    answer = read(text, depth)
    if answer.kind == "value":
        raise Unreadable("a number is no set")
    return intervals(answer)


def read_number(text: str) -> Answer:
    """One value, or two where there is a plus-minus sign."""
    text, mark = unmarked(text), text[len(unmarked(text)) :]
    unit = "degree" if "c" in mark or "d" in mark else ""  # \\circ, \\degree
    plus = Answer("value", read_values(text, sign=1), unit=unit)
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return plus
    return Answer("list", (plus, Answer("value", read_values(text, sign=-1))), marks="±")


def unmarked(text: str) -> str:
    """The text without a sign of percent or degree at its end; sin 50° and sums keep the sign."""
    number = MARK.sub("", text)
    return text if READS_DEGREES.search(text) or OPERATION.search(number) else number


def constant(text: str) -> Number:
    """The value of a text without variables."""
    value, names = read_value(unmarked(text))
    if names:
        raise Unreadable("a variable where a number is needed")
    return value


def read_bracketed(text: str, depth: int) -> Answer:
    """A tuple or interval, a set, or a group around one answer."""
    marks, inner = text[0] + text[-1], text[1:-1]
    parts = split(inner, ",;∨" if marks == "⦃⦄" else ",;", within=True)
    if marks == "⦃⦄":
        if "⦃" in inner or "«empty set»" in inner:
            raise Unreadable("a set of a set")
        return replace(as_list([read(part, depth) for part in parts], either=False), marks=marks)
    if marks == "{}" or (len(parts) == 1 and marks in ("()", "[]")):
        return read(inner, depth)
    items = tuple(read(part, depth) for part in parts)
    if any(item.marks == "±" for item in items):  # (±2, 0) is two points
        both = [[item.parts[i] if item.marks == "±" else item for item in items] for i in (0, 1)]
        points = (Answer("tuple", tuple(items), marks=marks) for items in both)
        return Answer("list", tuple(points), marks="±")
    if any(item.kind == "list" for item in items) or marks not in ("()", "[]", "(]", "[)"):
        raise Unreadable("no tuple")
    if len(parts) == 1:
        raise Unreadable("brackets do not match")
    return Answer("tuple", items, marks=marks)


def read_matrices(text: str) -> tuple:
    """The rows of a matrix, given as a sum of products of matrices with a factor before each."""
    total, product, at = None, None, 0
    for found in at_most(MATRIX.finditer(text)):
        between, at = text[at : found.start()].strip(), found.end()
        if total is None and product is None:
            factor = between
        elif between[:1] in ("+", "-"):
            total, product = sum_of_matrices(total, product), None
            factor = between.lstrip("+ ")
        else:
            factor = re.sub(r"^(?:\\cdot|\\times)", "", between).strip()
        factor = factor + "1" if factor in ("", "-") else factor
        rows = [at_most(split(row, "&")) for row in at_most(found[2].split("¶")) if row.strip()]
        rows = scaled(read_values(factor), [[read_values(cell) for cell in row] for row in rows])
        product = rows if product is None else product_of_matrices(product, rows)
    if text[at:].strip():
        raise Unreadable("something behind a matrix")
    return sum_of_matrices(total, product)


def scaled(factor: tuple, rows: list) -> tuple:
    if not rows or len({len(row) for row in rows}) > 1:
        raise Unreadable("no matrix")
    return tuple(tuple(pointwise(expr.multiply, factor, cell) for cell in row) for row in rows)


def sum_of_matrices(one: tuple | None, two: tuple) -> tuple:
    if one is None:
        return two
    if (len(one), len(one[0])) != (len(two), len(two[0])):
        raise Unreadable("a sum of matrices of unlike sizes")
    pairs = [zip(*rows, strict=True) for rows in zip(one, two, strict=True)]
    return tuple(tuple(pointwise(expr.add, *pair) for pair in row) for row in pairs)


def product_of_matrices(one: tuple, two: tuple) -> tuple:
    if len(one[0]) != len(two):
        raise Unreadable("a product of matrices of unlike sizes")
    return tuple(tuple(dot(row, column) for column in zip(*two, strict=True)) for row in one)


def dot(row: tuple, column: tuple) -> tuple:
    terms = [pointwise(expr.multiply, *pair) for pair in zip(row, column, strict=True)]
    return reduce(partial(pointwise, expr.add), terms)


def pointwise(operation, one: tuple, two: tuple) -> tuple:
    return tuple(None if None in pair else operation(*pair) for pair in aligned(one, two))


def aligned(one: tuple, two: tuple) -> list[tuple]:
    """Pairs of values at the same points; a value without variables is the same at each point."""
    points = max(len(one), len(two))
    return [(one[i % len(one)], two[i % len(two)]) for i in range(points)]


def read_base(digits: str, base: str) -> Answer | None:
    """1011_2 as digits and base; 25_10 as a plain number; None if the base has no such digits."""
    if base.lower() in NUMERALS:
        base = str(NUMERALS.index(base.lower()))
    if not base.isdecimal() or not 2 <= int(base[:3]) <= 36:
        return None
    if any(int(digit, 36) >= int(base) for digit in digits if digit.isalnum()):
        return None
    if base == "10":
        return read_number(digits)
    return Answer("base", (digits.lstrip("0") or "0", int(base)))


def read_congruence(name: str | None, residue: str, modulus: str) -> Answer:
    """x ≡ 3 (mod 8) is 3, if that is the least residue."""
    residue, modulus, name = residue.strip(), int(modulus.strip("{}")), (name or "").strip()
    if not residue.isdecimal() or int(residue) >= modulus or re.fullmatch(r"-?[\d.]+", name):
        raise Unreadable("no least residue, or two answers")
    if name and not VARIABLE.fullmatch(name):
        constant(name)  # raises Unreadable if it is no number
        name = ""
    return Answer("value", (constant(residue),), name, unit=f"mod {modulus}")


def read_letters(letters: str) -> Answer:
    """Letters alone: i, e, or a word, which may also be a product of two usual variables."""
    if letters in ("i", "e"):
        return read_number(letters)
    usual = re.fullmatch(r"[a-z]|[abckmnpqrstuvwxyz]{2}", letters)
    return replace(phrase(letters), values=read_values(letters) if usual else ())


def read_words(text: str, depth: int) -> Answer:
    """A number with a unit, else a phrase."""
    number, _, rest = text.partition("«")
    number = number.strip()
    if re.search(r"\d|\\(?:sqrt|pi|frac)", number) and UNIT.fullmatch("«" + rest):
        unit = re.sub(r"[«».\s{}/]+", " ", rest).lower().replace(" per ", " ").split()
        zeros = [SCALES[word] for word in unit if word in SCALES]
        unit = [word for word in unit if word not in SCALES]
        if unit in (["a", "m"], ["p", "m"]):
            unit = ["".join(unit)]
        if zeros:
            number = f"({number}) \\cdot 10^{{{sum(zeros)}}}"
        if not unit or is_unit(unit):
            return replace(read_item(number, depth), unit=unit_name(unit))
    if re.search(r"[\\^=<>≤≥|+*]|(?<![a-z])[-/]|[-/](?![a-z])", text.casefold()):
        raise Unreadable("words within mathematics")
    return phrase(text)


def is_unit(words: list[str]) -> bool:
    """Are these words a unit, which may be left out behind a number?"""
    words = [word.rstrip("23^") for word in words if word.rstrip("23^")]
    if not words or TWISTS & set(words) or set(NUMERALS) & set(words) or len(words) > 4:
        return False
    noun = words[-1] in UNITS or words[-1] in NOUNS or words[-1][-1:] == "s"
    return noun and all(word.isalpha() for word in words)


def phrase(text: str) -> Answer:
    """Words as an answer, without case, punctuation and article; some of them name a number."""
    text = re.sub(r"^(?:[Tt]he|an?) (?=[a-z]{3})", "", text.replace("«", " ").strip())
    words = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    if words in ("", "nan"):
        raise Unreadable("no word")
    if words in ("all real numbers", "all reals", "real numbers", "all real values"):
        return Answer("reals", (EVERYTHING,))
    if words == "infinity":
        return Answer("value", (math.inf,))
    if words in NUMERALS:
        return read_number(str(NUMERALS.index(words)))
    return Answer("word", (words,), values=read_values("e") if text == "e»" else ())


def unit_name(words: list[str]) -> str:
    """The short name of a known unit with its power, "" for any other words."""
    text = " ".join(words)
    known = [UNITS[word] for word in re.sub(r"\^ ?\d", "", text).split() if word in UNITS]
    squared = re.search(r"\bsq(uare)?\b|\^ ?2", text)
    cubed = re.search(r"\bcu(bic)?\b|\^ ?3", text)
    name = " ".join(known) + ("2" if squared else "3" if cubed else "")
    return {"mi h": "mph", "km h": "kph"}.get(name, name if known else "")


# --- 2. Relations, and sets of real numbers ---------------------------------------------------

FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠"}


def is_solved(text: str) -> bool:
    """Does a variable stand alone on a side of each equation and inequality?"""
    relations = [part for part in re.split("[,;∨]", tidy(text)) if RELATION.search(part)]
    return all(
        any(VARIABLE.fullmatch(side) and "|" not in side for side in RELATION.split(relation))
        for relation in relations
    )


def read_relation(text: str, depth: int) -> Answer:
    """name = value, an equation, an inequality, or a chain of them."""
    signs = RELATION.findall(text)
    sides = at_most(side.strip() for side in split(RELATION.sub("\0", text), "\0"))
    if len(sides) != len(signs) + 1:
        raise Unreadable("a relation within brackets")
    if signs[-1] == "≈" and "≈" not in signs[:-1]:
        return read_approximation(text, sides, depth)
    if not all(sides) or len(set(sides)) == 1:
        raise Unreadable("a side is empty, or all are the same")
    if set(signs) == {"="}:
        return read_equation(sides, depth)
    if "=" in signs or "≈" in signs:
        raise Unreadable("relations of several kinds")
    return read_inequality(sides, signs)


def read_approximation(text: str, sides: tuple[str, ...], depth: int) -> Answer:
    """x ≈ 8.24 as x = 8.24; x = 2/3 ≈ 0.67 as x = 2/3, if 2/3 does round to 0.67."""
    *_, exact, near = sides
    if len(sides) == 2 and (not exact or VARIABLE.fullmatch(exact)):
        constant(near.partition("«")[0])  # raises Unreadable if it is no number
        return replace(read(near, depth), name=exact)
    if not re.fullmatch(r"-?\d*\.?\d+", near):
        raise Unreadable("no rounded number")
    slack = expr.HALF / 10 ** len(near.partition(".")[2])
    if expr.below(slack, expr.magnitude(expr.add(constant(exact), -constant(near)))):
        raise Unreadable("two answers")
    return read(text.rpartition("≈")[0], depth)


def read_equation(sides: tuple[str, ...], depth: int) -> Answer:
    """x = 5 as the value 5 with the name x; x + y = 5 as an equation."""
    if len(sides) == 2 and VARIABLE.fullmatch(sides[1]) and not VARIABLE.fullmatch(sides[0]):
        sides = sides[::-1]
    name = re.sub(r"\s", "", sides[0])
    if len(sides) == 2 and POINT.fullmatch(sides[0]):
        return read_point(name, read(sides[1], depth))
    if len(sides) == 2 and re.fullmatch(r"«[^»]*»", sides[0]):
        answer, words = read(sides[1], depth), re.findall(r"\w+", sides[0].lower())
        no_name = TWISTS.union(NUMERALS, ["square", "cube"])
        if answer.kind == "word" or len(words) > 4 or no_name & set(words):
            raise Unreadable("words on the left that are no name")
        return replace(answer, name=name if len(words) == 1 else "")
    named = VARIABLE.fullmatch(sides[0])
    if TWISTS & set(re.findall(r"[a-z]+", name.lower())):
        raise Unreadable("no name")
    letter = named and (named[1] or (named[2] or named[3]).partition("^")[0])
    if len(sides) == 2 and not (named and letter not in variables(sides[1])):
        return Answer("equation", difference(*sides))
    answers = [read(side, depth) for side in sides[1:]]
    if not named or not all(same(one, two) for one, two in pairwise(answers)):
        raise Unreadable("a chain without a name, or two answers")
    try:
        values = difference(sides[0], sides[-1])
    except (ValueError, ArithmeticError):  # the right side is no expression
        values = ()
    return replace(answers[-1], name=name, values=values)


def read_point(names: str, point: Answer) -> Answer:
    """(x, y) = (1, 2) as a tuple with a name; x and y must be in alphabetical order."""
    letters = names[1:-1].split(",")
    if point.kind != "tuple" or len(letters) != len(point.parts) or letters != sorted(letters):
        raise Unreadable("names and values do not go together")
    return replace(point, name=names)


def variables(text: str) -> set[str]:
    try:
        return read_value(text)[1]
    except (ValueError, ArithmeticError):
        return set()


def difference(left: str, right: str) -> tuple[Number, ...]:
    """left - right at each point; Unreadable if it has no variables or is zero everywhere."""
    values = read_values(f"({unmarked(left)}) - ({unmarked(right)})")
    if len(values) == 1 or all(value == 0 for value in values if value is not None):
        raise Unreadable("a tautology, or no variable")
    return values


def read_inequality(sides: tuple[str, ...], signs: list[str]) -> Answer:
    """x > 3, -1 < 2x ≤ 2 and |x - 1| < 3 as sets of numbers; s^2 < 8r stays an inequality."""
    links = [*zip(signs, pairwise(sides), strict=True)]
    names = set().union(*(variables(side) for side in sides))
    one_way = {*signs} <= {*"<≤"} or {*signs} <= {*">≥"}
    calls = [side for side in sides if VARIABLE.fullmatch(side) and "|" not in side]
    if len(signs) == 1 or one_way:
        name = (
            calls[0].strip() if len(calls) == 1 else names.copy().pop() if len(names) == 1 else ""
        )
        found = [solutions(sign, *pair, name) for sign, pair in links] if name else [None]
        if None not in found:
            if not (within := combine(all, *found)):
                raise Unreadable("no number is between")
            return Answer("reals", within, name=re.sub(r"\s", "", name))
    if signs[-1] in "<≤":
        links = [(FLIPPED[sign], pair[::-1]) for sign, pair in reversed(links)]
    chain = tuple(Answer("inequality", difference(*pair), marks=sign) for sign, pair in links)
    return chain[0] if len(chain) == 1 else Answer("chain", chain)


def solutions(sign: str, left: str, right: str, name: str) -> tuple | None:
    """The x for which left `sign` right holds; None if it is linear neither in x nor in |..|."""
    if INFINITE.fullmatch(left.strip()) or right.strip() == name:
        left, right, sign = right, left, FLIPPED[sign]
    if found := re.fullmatch(r"\|([^|]*)\|", left.strip()):
        negative = solutions(FLIPPED[sign], found[1], f"-({right})", name)
        positive = solutions(sign, found[1], right, name)
        if None in (negative, positive):
            return None
        return combine(all, negative, positive) if sign in "<≤" else (*negative, *positive)
    if left.strip() == name:
        bound, rises = bound_of(right), True
    else:
        bound, rises = root_of(left, right, name)
    if bound is None:
        return None
    if sign == "≠":
        return ((-math.inf, False, bound, False), (bound, False, math.inf, False))
    if (sign in "<≤") == rises:
        return ((-math.inf, False, bound, sign in "≤≥"),)
    return ((bound, sign in "≤≥", math.inf, False),)


def root_of(left: str, right: str, name: str) -> tuple[Number | None, bool]:
    """Where left - right is 0, and whether it rises; (None, False) if not linear in `name`."""
    heights = difference(left, right)
    places = [expr.variable(name, point) for point in range(len(heights))]
    if None in heights or not all(map(expr.is_real, heights)):
        return None, False
    (x, y), *others = zip(places, heights, strict=True)
    slopes = [expr.divide(expr.add(v, -y), expr.add(u, -x)) for u, v in others]
    if not all(equal(slope, slopes[0]) for slope in slopes) or slopes[0] == 0:
        return None, False
    return expr.add(x, -expr.divide(y, slopes[0])), expr.below(-slopes[0], slopes[0])


def bound_of(text: str):
    return read_item(text, 0).parts[0] if INFINITE.fullmatch(text) else constant(text)


def intervals(answer: Answer) -> tuple[tuple, ...]:
    """An interval or a finite set as tuples (low, is low in it?, high, is high in it?)."""
    if answer.kind == "reals":
        return answer.parts
    if answer.kind == "tuple" and len(answer.parts) == 2:
        low, high = (part.parts[0] if part.kind == "value" else None for part in answer.parts)
        closed = (answer.marks[0] == "[", answer.marks[1] == "]")
        at_infinity = (closed[0] and low == -math.inf) or (closed[1] and high == math.inf)
        if None not in (low, high) and before(low, high) and not at_infinity:
            return ((low, closed[0], high, closed[1]),)
    points = answer.parts if answer.kind == "list" else (answer,)
    if all(p.kind == "value" and len(p.parts) == 1 and p.parts[0] not in ENDS for p in points):
        return tuple((point.parts[0], True, point.parts[0], True) for point in points)
    raise Unreadable("no set of real numbers")


def first_alone(within: list[bool]) -> bool:
    return within[0] and not within[1]


def combine(rule, *sets: tuple) -> tuple:
    """The numbers x for which rule([is x in set 1?, in set 2? ..]) is true, as intervals."""
    ends = [x for parts in sets for low, _, high, _ in parts for x in (low, high)]
    ends = sorted({x for x in ends if x not in ENDS}, key=lambda x: float(expr.inexact(x).real))
    places = [(x, x) for x in ends] + [*pairwise((-math.inf, *ends, math.inf))]
    return tuple(
        (low, low == high, high, low == high)
        for low, high in places
        if rule([holds(between(low, high), parts) for parts in sets])
    )


def between(low, high) -> Number:
    """A number between two, of which one or both may be infinite."""
    if low in ENDS:
        return ONE if high in ENDS else expr.add(high, -ONE)
    return expr.add(low, ONE) if high in ENDS else expr.multiply(expr.HALF, expr.add(low, high))


def before(x, y) -> bool:
    """x < y, where either may be infinite."""
    if isinstance(x, float) or isinstance(y, float):
        return x != y and (x == -math.inf or y == math.inf)
    return expr.is_real(x) and expr.is_real(y) and expr.below(x, y)


def alike(x, y) -> bool:
    """x = y, where either may be infinite."""
    if isinstance(x, float) or isinstance(y, float):
        return isinstance(x, float) and isinstance(y, float) and x == y
    return equal(x, y)


def holds(x: Number, parts: tuple) -> bool:
    """Is x in one of the intervals?"""
    return any(
        (before(low, x) and before(x, high))
        or (has_low and alike(low, x))
        or (has_high and alike(x, high))
        for low, has_low, high, has_high in parts
    )


# --- 3. Comparison ----------------------------------------------------------------------------


def same(one: Answer, two: Answer) -> bool:
    """Are two answers the same? Names and known units must agree where both answers have them."""
    if (one.name and two.name and one.name != two.name) or "equation" in (one.kind, two.kind):
        return proportional(as_equation(one), as_equation(two))
    units = {one.unit, two.unit} - {""}
    if len(units) > 1 and not ("degree" in units and all(u.startswith("degree") for u in units)):
        return False
    if one.kind != two.kind and "list" in (one.kind, two.kind):
        one, two = (a.parts[0] if a.kind == "list" and len(a.parts) == 1 else a for a in (one, two))
    one, two = as_tuple(one, two), as_tuple(two, one)
    kinds = {one.kind, two.kind}
    if kinds == {"word"} and one.parts == two.parts:
        return True
    if kinds <= {"word", "value"}:
        return same_values(*(a.parts if a.kind == "value" else a.values for a in (one, two)))
    if kinds == {"ratio", "value"} and ":" not in (one.marks, two.marks):  # no time of day
        return same_values(quotient(one), quotient(two))
    if "reals" in kinds and kinds <= {"reals", "tuple", "list"}:
        return same_reals(intervals(one), intervals(two))
    if len(kinds) > 1 or len(one.parts) != len(two.parts):
        return False
    return COMPARISONS[one.kind](one, two)


def as_tuple(answer: Answer, other: Answer) -> Answer:
    """x = 2, y = 3 as (2, 3), in alphabetical order, if the other answer is a tuple."""
    if other.kind != "tuple" or answer.marks != "named" or not all(p.name for p in answer.parts):
        return answer
    parts = sorted(answer.parts, key=lambda part: part.name)
    return Answer("tuple", tuple(replace(part, name="") for part in parts), marks=other.marks)


def as_equation(answer: Answer) -> tuple:
    """left - right at each point, () if the answer is no equation."""
    if answer.kind == "equation":
        return answer.parts
    return answer.values if answer.name else ()


def quotient(answer: Answer) -> tuple:
    if answer.kind == "value":
        return answer.parts
    return (expr.divide(*answer.parts),) if len(answer.parts) == 2 else ()


def same_values(one: tuple, two: tuple) -> bool:
    """Are the values the same at each point where one is real? At all points if none is real."""
    if not one or not two:
        return False
    pairs = compared(aligned(one, two))
    if isinstance(one[0], float) or isinstance(two[0], float):
        return all(alike(x, y) for x, y in pairs)
    with_reals = [pair for pair in pairs if any(map(expr.is_real, pair))]
    return all(equal(x, y) for x, y in with_reals or pairs)


def compared(pairs) -> list[tuple]:
    """The pairs of values; Unreadable if there are none, or if only one of a pair has a value."""
    pairs = [pair for pair in pairs if pair != (None, None)]
    if not pairs or any(None in pair for pair in pairs):
        raise Unreadable("not defined at the same points")
    return pairs


def same_items(one: Answer, two: Answer) -> bool:
    """Do two lists have the same items, each as often, in any order?"""
    if (one.marks == "named") != (two.marks == "named"):
        return False
    left = list(two.parts)
    for item in one.parts:
        found = next((at for at, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def same_tuple(one: Answer, two: Answer) -> bool:
    return one.marks == two.marks and all(map(same, one.parts, two.parts))


def same_matrix(one: Answer, two: Answer) -> bool:
    rows = zip(one.parts, two.parts, strict=True)
    return all(len(a) == len(b) and all(map(same_values, a, b)) for a, b in rows)


def same_reals(one: tuple, two: tuple) -> bool:
    return not combine(lambda within: within[0] != within[1], one, two)


def proportional(one: tuple, two: tuple) -> bool:
    """Do two ratios, or left - right of two equations at each point, differ by a factor at most?"""
    if len(one) != len(two) or not one or one[0] == 0 or two[0] == 0:
        return False
    pairs = compared(zip(one, two, strict=True))
    return all(equal(expr.multiply(x, two[0]), expr.multiply(y, one[0])) for x, y in pairs)


def same_ratio(one: Answer, two: Answer) -> bool:
    if one.marks or two.marks:  # times of day: 3:08 is not 9:24
        return one.marks == two.marks and one.parts == two.parts
    return proportional(one.parts, two.parts)


def same_inequality(one: Answer, two: Answer) -> bool:
    factor = expr.divide(one.parts[0], two.parts[0])
    # a positive factor keeps the sign < or ≤; any factor keeps ≠
    kept = one.marks == "≠" or (expr.is_real(factor) and expr.below(-factor, factor))
    return one.marks == two.marks and kept and proportional(one.parts, two.parts)


COMPARISONS = {"list": same_items, "tuple": same_tuple, "chain": same_tuple, "matrix": same_matrix}
COMPARISONS |= {"ratio": same_ratio, "inequality": same_inequality}
COMPARISONS["base"] = lambda one, two: one.parts == two.parts
