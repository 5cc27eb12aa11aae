"""The reward of the built-in task."""

import pytest

from data import Problem
from rewards import reward, stated_answer

PROBLEM = Problem("4+7 9+0 3+6 =", "1 1 9 9", "sums", "p")


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [("1 1 9 9", 1.0), ("1 1 9 8", 0.0), ("1199", 0.0), ("0 1 1 9 9", 0.0), ("", 0.0)]
    + [("1 1 9", 0.0), ("1 1 9 9 9", 0.0), ("1 1 9 9 =", 0.0), ("<bos> 1 1 9 9", 0.0)],
)
def test_only_the_digits_of_the_sum_are_right(attempt, expected):
    assert reward(attempt, PROBLEM) == expected


def test_math_is_rewarded_for_the_final_answer_alone():
    half = Problem("Half of 1?", r"\frac{1}{2}", "math", "p")
    assert reward(r"One over two is \boxed{0.5}.", half) == 1.0
    assert reward("Final Answer: The final answer is $1/2$. I hope it is correct.", half) == 1.0
    assert reward(r"It is 0.5, or \boxed{2}.", half) == 0.0
    assert reward("It is 0.5.", half) == 0.0


def test_an_unreadable_attempt_states_nothing():
    assert stated_answer("again 1", "sums") is None
    assert stated_answer("1 2", "sums") == "1 2"
