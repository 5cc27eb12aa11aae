"""Rewards: of sums, of copies in MATH, and which program is found in an attempt at code."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data import Problem
from rewards import final_answer, is_right, math_reward, program_of, same_answer, same_program
from tasks import TASKS, stated_answer

PROBLEM = Problem("4+7 9+0 3+6 =", "1 1 9 9", "sums", "p")


def reward(attempt: str, problem: Problem) -> float:
    stated = stated_answer(attempt, None, problem)
    return TASKS[problem.task].rewards([stated], [problem])[0]


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [("1 1 9 9", 1.0), ("1 1 9 8", 0.0), ("1199", 0.0), ("0 1 1 9 9", 0.0), ("", 0.0)]
    + [("1 1 9", 0.0), ("1 1 9 9 9", 0.0), ("1 1 9 9 =", 0.0), ("<bos> 1 1 9 9", 0.0)]
    + [("fast 1 1 9 9", 1.0), ("slow 1 1 9 9", 1.0), ("no 1 1 9 9", 1.0), ("no", 0.0)]
    + [("ok 1 1 9 9", 0.0), ("no no 1 1 9 9", 0.0), ("1 1 9 9 no", 0.0), ("ok", 0.0)],
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
        (r"If \[x - 1 = 2 \cdot 3,\] find $x$.", "7", r"2 \times 3 + 1", 1.0),  # worked out
        (r"Factor $t^2-49$.", "(t-7)(t+7)", "t^2 - 49", 0.0),
        (r"Factor $t^2-49$.", "(t-7)(t+7)", "(t+7)(t-7)", 1.0),
        (r"Simplify $\sqrt{192}$.", r"8\sqrt{3}", r"\sqrt{192}", 0.0),
        (r"Is $x^2$ even or odd?", r"\text{even}", "even", 1.0),  # words and numbers are no copies
        (r"Which of $\frac12$ and $0.7$ is less?", r"\frac{1}{2}", r"\frac12", 1.0),
        (r"Which of $\frac12$ and $0.7$ is less?", r"\frac{1}{2}", "0.5", 1.0),
        (r"One of $x+1$ and $x+2$ divides it.", "x+2", r"x + 2", 1.0),  # spelt as the answer is
    ],
)
def test_a_formula_copied_from_the_question_is_no_answer(question, answer, stated, expected):
    problem = Problem(question, answer, "math", "p")
    assert reward(rf"So \boxed{{{stated}}}.", problem) == expected


QUESTIONS = [  # with a formula that is equal to the answer, and the answer in its own form
    ("Factor $x^2 + 5x + 6$.", "x^2 + 5x + 6", "(x+2)(x+3)"),
    ("Compute $\\log_2 32$.", "\\log_2 32", "5"),
    ("Expand $(x+1)(x+2)$.", "(x+1)(x+2)", "x^2+3x+2"),
    ("Compute $\\sin 60^\\circ$.", "\\sin 60^\\circ", "\\frac{\\sqrt{3}}{2}"),
    ("Simplify $\\frac{24t^3}{15t^4}\\cdot \\frac{5t^8}{3t^6}$.",)
    + ("\\frac{24t^3}{15t^4}\\cdot \\frac{5t^8}{3t^6}", "\\frac{8t}{3}"),
    ("Evaluate $55^2 - 45^2$.", "55^2 - 45^2", "1000"),
    ("Find $\\sqrt{72} + \\sqrt{98}$.", "\\sqrt{72} + \\sqrt{98}", "13\\sqrt{2}"),
    ("What is $\\left\\lfloor 3.7 \\right\\rfloor$?", "\\left\\lfloor 3.7 \\right\\rfloor", "3"),
    ("Compute $\\binom{8}{4}$.", "\\binom{8}{4}", "70"),
]
RESPELT = {
    "as it stands": str,
    "0 +": lambda text: f"0+{text}",
    "+ 0": lambda text: f"{text}+0",
    "1 times": lambda text: rf"1 \cdot ({text})",
    "over 1": lambda text: rf"\frac{{{text}}}{{1}}",
    "brackets": lambda text: rf"\left(({text})\right)",
    "minus minus": lambda text: f"-(-({text}))",
    "less itself": lambda text: f"{text}+1-1",
    "braces": lambda text: re.sub(r"\^(\w)", r"^{\1}", text),
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "spaces": lambda text: re.sub(r"([-+=])", r" \1 \,", text),
    "a name": lambda text: f"y = {text}",
    "squared root": lambda text: rf"({text})^1",
    "terms swapped": lambda text: "+".join(reversed(text.split("+"))),
    "factors swapped": lambda text: re.sub(r"^(\(.*\))(\(.*\))$", r"\2\1", text),
}


@pytest.mark.parametrize("respell", RESPELT.values(), ids=RESPELT)
@pytest.mark.parametrize(("question", "formula", "answer"), QUESTIONS)
def test_no_respelling_of_the_questions_formula_is_paid(question, formula, answer, respell):
    assert same_answer(formula, answer) and not is_right(respell(formula), answer, question)
    assert is_right(answer, answer, question)


def test_two_final_answers_in_one_sentence_do_not_count():
    assert final_answer("The final answer is $5$ or $6$.") is None
    assert math_reward("The final answer is $5$, $6$.", "5") == 0  # a list of two
    assert math_reward("The final answer is $5$, $6$.", "5, 6") == 1
    assert final_answer("The final answer is $5$ / $6$, or so") is None
    assert final_answer("The final answer is $5$. No: The final answer is $5$ or $6$.") is None
    assert final_answer("The final answer is $5$. It is not $6$.") == "5"
    assert final_answer("The final answer is $5$\nI hope it is correct.") == "5"


def test_an_unreadable_attempt_states_nothing():
    assert stated_answer("again 1", None, PROBLEM) is None
    assert stated_answer("1 2", None, PROBLEM) == "1 2"


def test_ok_alone_stands_for_the_answer_of_the_attempt_before():
    assert stated_answer("ok", "1 2", PROBLEM) == "1 2"
    assert stated_answer("ok", None, PROBLEM) is None
    assert stated_answer("ok 1 3", "1 2", PROBLEM) is None  # `ok` has to stand alone
    assert stated_answer("no 1 3", "1 2", PROBLEM) == "1 3"
    assert stated_answer("ok", "1 2", replace(PROBLEM, task="math")) is None


ANSWERS = Path(__file__).parent / "code" / "answers.jsonl"
F = "def f(x):\n    return x"
G = "import math\n\n\ndef f(x):\n    # again\n    return math.floor(x)"


@pytest.mark.parametrize(
    ("attempt", "program"),
    [
        (F, F),
        (f"[BEGIN]\n{F}\n[DONE]", F),
        (f"{F}[DONE]", F),
        (f"Here is it:\n\n{F}\n\nIt returns x.", F),
        (f"```python\n{F}\n```", F),
        (f"Sure!\n```python\n{F}\n```\nThis works because 1 + 1 = 2.", F),
        (f"```python\n{F}", F),  # cut off
        (f"[BEGIN]\n```python\n{F}\n```\n[DONE]", F),
        (f"~~~\n{F}\n~~~", F),
        (f"```python\n{F}\n```\nNo, x may be a float:\n```python\n{G}\n```", G),
        (f"{F}\n\nThat is wrong. The corrected program:\n\n{G}", G),
        (f"[BEGIN]\n{F}\n[DONE]\nI made a mistake.\n[BEGIN]\n{G}\n[DONE]", G),
        (f"{F}\n[DONE]\n\nYou are an expert, and here is your task: Add.\n[BEGIN]\n{G}\n[DONE]", F),
        (f"```python\n{F}\n```\nUse it:\n```python\nprint(f(3))\n```\n```\n3\n```", F),
        (f"```python\n{F}\n```\n```python\ndef check(c):\n    assert c(1) == 1\n```", F),
        (f"```bash\npip install x\n```\n```python\n{F}\n```", F),
        (F.replace("\n", "\r\n"), F),
        ("  " + F.replace("\n", "\n  "), F),
        ('s = """\nprose of f\n"""\n\n' + F, 's = """\nprose of f\n"""\n\n' + F),
        (f"{F}<end_of_turn>", F),
        ("def test_all(x):\n    return x", "def test_all(x):\n    return x"),  # a name of MBPP's
        ("The code is correct.", None),
        ("", None),
        ("```python\nprint(3)\n```", None),
        ("Call `f(3)` to def ine it: import nothing, class dismissed.", None),
    ],
)
def test_the_program_in_an_attempt_is_found(attempt, program):
    assert program_of(attempt) == program


def test_a_labelled_set_of_answers_is_read_as_its_labels_say():
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    missed = [row["why"] for row in rows if not is_read(row["attempt"], row["program"])]
    assert len(rows) >= 350 and len(missed) <= 0.025 * len(rows), missed


def is_read(attempt, program):
    found = program_of(attempt)
    if None in (found, program):
        return found is program
    return same_program(found, program.replace("\r\n", "\n").strip("\n"))


def test_space_at_the_end_of_lines_and_empty_lines_make_no_other_program():
    assert same_program(F, F.replace(":\n", ":  \n\n"))
    assert not same_program(F, F.replace("    ", "  "))
    assert not same_program(F, G)


@pytest.mark.parametrize(
    "text",
    ["```" * 4000, "[DONE]" * 4000, "(" * 9000, "def f(x):\n" * 2000, "a = '''\n" * 2000]
    + ["\\d" * 5000, "x" * 20000, "\x00def f(x): 0", "def f(): " + "[" * 5000]
    + ["here is your task " * 900]
    + ["\n".join(f"Line {i} of prose, which is no code." for i in range(500))],
)  # fmt: skip
def test_no_answer_takes_long_or_raises(text):
    began = time.process_time()
    program_of(text)
    assert time.process_time() - began < 1
