r"""Is it right? One number for an attempt: 1.0 or 0.0, never a share and never for the format.

    attempt ── final_answer ──▶ "\frac{2}{4}" ── same_answer ──▶ right, if the gold answer is 1/2

`final_answer` finds what an attempt at a MATH problem claims; `same_answer` reads that and the gold
answer into a structure (a list, an interval, an equation, a word ...) of values and compares them.
What cannot be read is wrong, and so are two answers where one is asked for: the policy is paid for
whatever this file accepts, and will find it. Pure functions of text, without state; they never
raise. A cut-off attempt is judged like any other. Next to read: cache.py.
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
    right = math_reward(attempt, problem.answer) == 1.0
    return float(right and not is_copied(final_answer(attempt), problem))


def is_copied(stated: str, problem: Problem) -> bool:
    """Is it a formula of the question? Where that is to be worked out, its value is the right one.

    NOT IN PAPER, as is all of this checker. A number or word may well stand in the question, and
    so may what is spelt as the answer is.
    """
    if not OPERATION.search(stated):
        return False
    asked = [part for found in MATHS.findall(problem.question) for part in SIDES.split(found)]
    formulas = {bare(part) for part in asked if OPERATION.search(part)}
    stated, gold = bare(stated), bare(problem.answer)
    within = [formula for formula in formulas if formula in stated and formula not in gold]
    return any(same_answer(formula, problem.answer) for formula in within[:20]) or (
        stated != gold and any(stated in formula for formula in formulas)
    )


def bare(formula: str) -> str:
    r"""A formula without layout: \dfrac{1}{2}, \frac12 and 1/2 are spelt alike."""
    formula = LAYOUT.sub("", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", formula)).rstrip(".,")
    formula = re.sub(r"(?<=\\)[dt](?=frac|binom)", "", formula)
    return re.sub(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", formula)


def math_reward(attempt: str, answer: str) -> float:
    """1.0 if the final answer of an attempt is the gold `answer`, else 0.0."""
    stated = final_answer(attempt)
    return float(stated is not None and same_answer(stated, answer))


MATHS = re.compile(r"(?:\$|\\\[)(.+?)(?:\$|\\\])", re.DOTALL)
SIDES = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|approx)(?![a-z])")
LAYOUT = re.compile(r"[\s$]|\\[!,;: ]|~|\\(?:left|right|displaystyle)(?![a-z])")
OPERATION = re.compile(
    r"(?<=[\w)}])\s*[-+*/^!]|\\(?:[dt]?frac|sqrt|log|ln|[dt]?binom|lceil|lfloor|cdot|times|div|overline"
    r"|(?:arc)?(?:sin|cos|tan))"
)
PAPERS_FORM = re.compile(r"[Tt]he final answer is:?\s*\$((?:\\.|[^$\\])+)\$", re.DOTALL)
AFTER_IT = re.compile(r"\s*(?:\.(?!\s*[Oo]r\b)|!|,?\s*I hope|\n|\Z)")  # not: "$5$ or $6$"


def final_answer(text: str) -> str | None:
    r"""What an attempt claims: its last balanced \boxed{..} or \fbox{..}, else its last
    "The final answer is $..$" (the form the paper's prompt asks for), else None.
    """
    text = text[-TAIL:]
    box, forms = last_box(text), list(PAPERS_FORM.finditer(text))
    if box is not None or not forms or not AFTER_IT.match(text, forms[-1].end()):
        return box
    return forms[-1][1].strip()


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
    except Exception:  # Unreadable, or what else a text may provoke: it shall not end the run
        return False
