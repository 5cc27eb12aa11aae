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


def test_an_unreadable_attempt_states_nothing():
    assert stated_answer("again 1", "sums") is None
    assert stated_answer("1 2", "sums") == "1 2"
