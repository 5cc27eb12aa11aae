"""Expressions as numbers, exact where they can be."""

from fractions import Fraction

import pytest

from checkers.expressions import MP, SIZES, Unreadable, equal, read_value, read_values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac{2}{4}", "1/2"),
        (r"\frac12", "1/2"),
        ("1/2/2", "1/4"),
        ("-2^2", "-4"),
        ("2^{3^2}", "512"),
        ("2^3^2", "512"),
        ("2^{-1}", "1/2"),
        (r"2\frac{1}{4}", "9/4"),
        ("-2 1/4", "-9/4"),
        (r"2 \cdot \frac{1}{4}", "1/2"),
        (r"0.\overline{3}", "1/3"),
        (r"0.1\bar{6}", "1/6"),
        (r"\sqrt{\frac{9}{4}}", "3/2"),
        (r"\sqrt[3]{-8}", "-2"),
        ("5!/3!", "20"),
        (r"\binom{5}{2}", "10"),
        (r"|{-3}|", "3"),
        (r"\lfloor -2.5 \rfloor", "-3"),
        (r"3(2+1)", "9"),
    ],
)
def test_rationals_are_exact(text, value):
    assert read_value(text) == (Fraction(value), set())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
        (r"\sin 30^\circ", r"\frac12"),
        (r"\cos\frac{\pi}{3}", "0.5"),
        (r"\sin^2 x + \cos^2 x", "1"),
        (r"\sin 2x", r"2\sin x\cos x"),
        (r"\log_2 8", "3"),
        (r"\ln e^2", "2"),
        (r"e^{i\pi}", "-1"),
        ("i^2", "-1"),
        (r"\frac{1}{i}", "-i"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\frac{n!}{(n-1)!}", "n"),
        ("f(1+1)", "f(2)"),
    ],
)
def test_equal_expressions_have_equal_values_at_every_point(one, two):
    assert all(agree(read_values(one), read_values(two)))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (r"\sqrt2", "1.41421356237309504880168872420969807856967187537694"),
        (r"\pi", r"\frac{355}{113}"),
        (r"\sqrt{x^2}", "x"),
        ("|x+6|", "x+6"),
        ("|xy|", "xy"),
        (r"\lfloor x \rfloor", "x"),
        ("x^2y", "xy^2"),
        ("x_1", "x_2"),
        (r"\sin x", "x"),
        ("f(x)", "fx"),
        ("f(4-x)", "4f-xf"),
    ],
)
def test_unequal_expressions_differ_at_some_point(one, two):
    assert not all(agree(read_values(one), read_values(two)))


def agree(one, two):
    length = max(len(one), len(two))
    pairs = [(one[i % len(one)], two[i % len(two)]) for i in range(length)]
    pairs = [pair for pair in pairs if None not in pair]
    assert len(pairs) == 1 or len(pairs) > 2
    return [equal(*pair) for pair in pairs]


@pytest.mark.parametrize(
    "text",
    [
        *("", "1/0", "0^0", "0^{-1}", r"\log 0", r"\tan 90^\circ", "1/(x-x)", "1 2", "(1", "1)"),
        *("2^{99999}", "9999!", "x x" * 90, r"\pi^{9999}", r"5+e^{-200}", "(-2)!", "50%", "1011_2"),
        *(r"3\frac{5}{2}", "- - - 1", r"\unknown", r"\pm 1", "٥", r"\sqrt[0]{2}", r"\frac"),
    ],
)
def test_what_has_no_value_or_is_too_large_is_unreadable(text):
    with pytest.raises((Unreadable, ZeroDivisionError)):
        read_value(text)


def test_variables_have_a_value_at_each_point_and_constants_one():
    assert len(read_values("x+1")) == len(SIZES) and len(read_values("1+1")) == 1
    assert read_value("x")[0] == read_value("x")[0] != read_value("y")[0]
    letters = "abcdefghjklmnopqrstuvwxyz"
    points = {a: [read_value(a, p)[0] > 0 for p in range(len(SIZES))] for a in letters if a != "e"}
    for one in points:
        assert points[one][0] and not points[one][-1]
        assert all(points[one] != points[two] for two in points if two != one)


def test_the_precision_stays_as_it_is():
    for text in (r"\sec 1", r"\arctan 2", r"\log_3 7", "x!", r"\cot x"):
        read_values(text)
    assert MP.dps == 70
