r"""Is it right? One number for an attempt: 1.0 or 0.0, never a share and never for the format.

    attempt ── final_answer ──▶ "\frac{2}{4}" ── same_answer ──▶ right, if the gold answer is 1/2

`final_answer` finds what an attempt at a MATH problem claims; `same_answer` reads that and the gold
answer into a structure (a list, an interval, an equation, a word ...) of values and compares them.
What cannot be read is wrong, and so are two answers where one is asked for: the policy is paid for
whatever this file accepts, and will find it. Pure functions of text, without state; they never
raise. A cut-off attempt is judged like any other. Next to read: sample.py.
"""

import re

from answers import read_answer, same
from data import Problem, last_box

TAIL, LONGEST = 20_000, 600  # characters: where a final answer is looked for, and its length

# --- 1. Rewards ----------------------------------------------------------------------------------


def sums_answer(attempt: str) -> str | None:
    """The digits of an attempt at a sum, or None if it is anything but digits."""
    return attempt if re.fullmatch(r"\d( \d)*", attempt) else None


def stated_answer(attempt: str, task: str) -> str | None:
    """The answer an attempt states, or None if it states none that can be found."""
    return {"sums": sums_answer, "math": final_answer}[task](attempt)


def agree(one: str, two: str, task: str) -> bool:
    """Do two attempts state the same answer?"""
    answers = stated_answer(one, task), stated_answer(two, task)
    if None in answers or task == "sums":
        return None not in answers and answers[0] == answers[1]
    return answers[0] == answers[1] or same_answer(*answers)


def reward(attempt: str, problem: Problem) -> float:
    """r̂(y, y*): 1.0 if the attempt states the problem's true answer, else 0.0 (section 3)."""
    if problem.task == "sums":
        return float(sums_answer(attempt) == problem.answer)
    return math_reward(attempt, problem.answer) * (not is_copied(final_answer(attempt), problem))


def is_copied(stated: str | None, problem: Problem) -> bool:
    """Is it a formula of the question? Where that is to be worked out, its value is the right one.

    NOT IN PAPER, as is all of this checker. A number or word may well stand in the question, and
    so may what is spelt as the answer is.
    """
    if not stated or not OPERATION.search(stated):
        return False
    stated, asked, gold = map(bare, (stated, problem.question, problem.answer))
    return stated in asked and stated != gold


def bare(formula: str) -> str:
    r"""A formula without layout: \dfrac{1}{2}, \frac12 and 1/2 are spelt alike."""
    formula = re.sub(r"\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?", r"\1/\2", formula)
    return re.sub(r"[\s${}]", "", formula)


def math_reward(attempt: str, answer: str) -> float:
    """1.0 if the final answer of an attempt is the gold `answer`, else 0.0."""
    stated = final_answer(attempt)
    return float(stated is not None and same_answer(stated, answer))


OPERATION = re.compile(
    r"(?<=[\w)}])\s*[-+*/^!]|\\(?:[dt]?frac|sqrt|log|ln|[dt]?binom|lceil|lfloor|cdot|times|div|overline"
    r"|(?:arc)?(?:sin|cos|tan))"
)
PAPERS_FORM = re.compile(  # and nothing like "$5$ or $6$"
    r"[Tt]he final answer is:?\s*\$((?:\\.|[^$\\])+)\$(?!\s*(?:,|or\b|and\b)[^.\n]{0,99}\$)",
    re.DOTALL,
)


def final_answer(text: str) -> str | None:
    r"""What an attempt claims: its last balanced \boxed{..} or \fbox{..}, else its last
    "The final answer is $..$" (the form the paper's prompt asks for), else None.
    """
    text = text[-TAIL:]
    forms = PAPERS_FORM.findall(text)
    box = last_box(text)
    return box if box is not None or not forms else forms[-1].strip()


def same_answer(prediction: str, gold: str) -> bool:
    """Is the prediction the gold answer? Both as in a box: LaTeX or ASCII, up to 600 characters.

    Equal numbers and functions are equal, rounded ones are not. Lists have no order, tuples do.
    Units, percent, degree and dollar signs may be there or not; a number's base may not be left
    out. What is no answer (empty, 1/0, 0 = 0) is never right, not even against itself.
    """
    if max(len(prediction), len(gold)) > LONGEST:
        return False
    try:
        return same(*(read_answer(text) for text in (prediction, gold)))
    except (
        Exception
    ):  # Unreadable, or what else a text can provoke: no reward, and no end of the run
        return False
