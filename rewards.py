"""Is it right? One number for an attempt: 1.0 or 0.0, never a share and never for the format.

Pure functions of text. `stated_answer` finds what an attempt claims (None if it claims nothing
readable); `reward` compares that with the true answer. A cut-off
attempt is judged like any other. Next to read: sample.py.
"""

import re

from data import Problem


def sums_answer(attempt: str) -> str | None:
    """The digits of an attempt at a sum, or None if it is anything but digits."""
    return attempt if re.fullmatch(r"\d( \d)*", attempt) else None


def stated_answer(attempt: str, task: str) -> str | None:
    """The answer an attempt states, in a form in which equal answers are equal strings."""
    return {"sums": sums_answer}[task](attempt)


def reward(attempt: str, problem: Problem) -> float:
    """r̂(y, y*): 1.0 if the attempt states the problem's true answer, else 0.0 (section 3)."""
    return float(stated_answer(attempt, problem.task) == problem.answer)
