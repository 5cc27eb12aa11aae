"""The reward of the built-in task."""

import pytest

from data import Problem
from rewards import final_answer
from tasks import TASKS, stated_answer

PROBLEM = Problem("4+7 9+0 3+6 =", "1 1 9 9", "sums", "p")


def reward(attempt: str, problem: Problem) -> float:
    return TASKS[problem.task].rewards([attempt], [problem])[0]


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


@pytest.mark.parametrize(
    ("question", "answer", "stated", "expected"),
    [
        (r"Compute $55^2 - 45^2$.", "1000", "55^2 - 45^2", 0.0),
        (r"Compute $55^2 - 45^2$.", "1000", "1000", 1.0),
        (r"Compute $55^2 - 45^2$.", "1000", r"x = \left(55^2 -\, 45^2\right) + 0", 0.0),
        (r"If \[x - 1 = 2 \cdot 3,\] find $x$.", "7", r"2 \times 3 + 1", 1.0),  # his own work
        (r"Factor $t^2-49$.", "(t-7)(t+7)", "t^2 - 49", 0.0),
        (r"Factor $t^2-49$.", "(t-7)(t+7)", "(t+7)(t-7)", 1.0),
        (r"Simplify $\sqrt{192}$.", r"8\sqrt{3}", r"\sqrt{192}", 0.0),
        (r"Is $x^2$ even or odd?", r"\text{even}", "even", 1.0),  # words and numbers may be there
        (r"Which of $\frac12$ and $0.7$ is less?", r"\frac{1}{2}", r"\frac12", 1.0),
        (r"Which of $\frac12$ and $0.7$ is less?", r"\frac{1}{2}", "0.5", 1.0),
        (r"One of $x+1$ and $x+2$ divides it.", "x+2", r"x + 2", 1.0),  # spelt as the answer is
    ],
)
def test_a_formula_copied_from_the_question_is_no_answer(question, answer, stated, expected):
    problem = Problem(question, answer, "math", "p")
    assert reward(rf"So \boxed{{{stated}}}.", problem) == expected


def test_of_two_final_answers_in_one_sentence_none_counts():
    assert final_answer("The final answer is $5$ or $6$.") is None
    assert final_answer("The final answer is $5$, $6$.") is None
    assert final_answer("The final answer is $5$ / $6$, or so") is None
    assert final_answer("The final answer is $5$. No: The final answer is $5$ or $6$.") is None
    assert final_answer("The final answer is $5$. It is not $6$.") == "5"
    assert final_answer("The final answer is $5$\nI hope it is correct.") == "5"


def test_an_unreadable_attempt_states_nothing():
    assert stated_answer("again 1", "sums") is None
    assert stated_answer("1 2", "sums") == "1 2"
