r"""Is it right? One number for an attempt: 1.0 or 0.0, never a share and never for the format.

    attempt ── final_answer ──▶ "\frac{2}{4}" ── same_answer ──▶ right, if the gold answer is 1/2
    attempt ── program_of ──▶ "def f(x): .." ── sandbox.run_many ──▶ right, if it passes all tests

`final_answer` finds what an attempt at a MATH problem claims; `same_answer` reads that and the gold
answer into a structure (a list, an interval, an equation, a word ...) of values and compares them.
What cannot be read is wrong, and so are two answers where one is asked for: the policy is paid for
whatever this file accepts, and will find it. No function here has state, and none raises over what
an attempt says. A cut-off attempt is judged like any other. Next to read: checkers/answers.py.
"""

import ast
import re
import textwrap
import warnings

from checkers.answers import read_answer, same
from data import InputError, Problem, last_box, preamble

# --- 1. Sums -----------------------------------------------------------------------------------


def sums_answer(attempt: str) -> str | None:
    """The digits of an attempt at a sum, after a word at most; None if it is anything else."""
    found = re.fullmatch(r"(?:(?:fast|slow|no) )?(\d(?: \d)*)", attempt)
    return found[1] if found else None


# --- 2. MATH -----------------------------------------------------------------------------------

TAIL, LONGEST = 20_000, 600  # characters: where a final answer is looked for, and its length


def is_right(stated: str, answer: str, question: str = "") -> bool:
    """Is a stated answer the gold `answer`, and no formula of the question as it stands there?"""
    return same_answer(stated, answer) and not is_copied(stated, answer, question)


def math_reward(attempt: str, answer: str, question: str = "") -> float:
    """r̂(y, y*): 1.0 if the final answer of an attempt is the gold `answer`, else 0.0."""
    stated = final_answer(attempt)
    return float(stated is not None and is_right(stated, answer, question))


def is_copied(stated: str, answer: str, question: str) -> bool:
    """Is it a formula of the question? Where that is to be worked out, its value is the right one.

    NOT IN PAPER, as is all of this checker. A number or word may well stand in the question, and
    so may what is spelt as the answer is.
    """
    if not OPERATION.search(stated):
        return False
    asked = [part for found in MATHS.findall(question) for part in SIDES.split(found)]
    formulas = {bare(part) for part in asked if OPERATION.search(part)}
    stated, gold = bare(stated), bare(answer)
    within = [formula for formula in formulas if formula in stated and formula not in gold]
    return any(same_answer(formula, answer) for formula in within[:20]) or (
        stated != gold and any(stated in formula for formula in formulas)
    )


def bare(formula: str) -> str:
    r"""A formula without layout: \dfrac{1}{2}, \frac12 and 1/2 are spelt alike."""
    formula = LAYOUT.sub("", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", formula)).rstrip(".,")
    formula = re.sub(r"(?<=\\)[dt](?=frac|binom)", "", formula)
    return re.sub(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", formula)


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


# --- 3. Programs -------------------------------------------------------------------------------

NEW_TASK = re.compile(r"^.*\bhere is (?:your|the next|another) task\b", re.I | re.M)
MARKER = re.compile(r"^[ \t]*\[BEGIN\]|\[DONE\][ \t]*$", re.I | re.M)
LEFTOVER = re.compile(r"(?:<end_of_turn>|<eos>|</s>|<\|[^|]*\|>)(?=\s|$)")
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
PYTHON = ("", "python", "py", "python3", "python2", "code", "ipython")
DEFINES = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?def \w+ *\(|class \w+ *[:(]|\w+ *= *lambda\b)", re.M
)
TESTING = re.compile(r"def (?:check\(|test)|class Test")
COMPLETIONS = (  # of a line that begins a statement of several
    ("{}", "{}\n 0", "try: 0\n{}\n 0", "if 0: 0\n{}\n 0")
    + ("{}\n)", "{}\n): 0", "{}\n]", "{}\n}}", '{}"""', "{}'''")
)


def code_rewards(programs: list[str | None], problems: list[Problem]) -> list[float]:
    """r̂(y, y*) of many: 1.0 if a program passes all tests of its problem, else 0.0.

    Before the program stands what stands before the function in HumanEval's prompt.
    """
    try:
        from checkers import sandbox  # cannot be imported on a system without fork
    except ImportError as error:
        raise InputError(f"--task code needs Linux or macOS for its sandbox: {error}") from error
    jobs = [
        (preamble(problem.given) + (program or ""), list(problem.tests))
        for program, problem in zip(programs, problems, strict=True)
    ]
    return list(map(float, sandbox.run_many(jobs)))


def same_program(one: str, two: str) -> bool:
    """Are two programs the same, but for empty lines and spaces at the end of lines?"""
    lines = ([line.rstrip() for line in program.split("\n")] for program in (one, two))
    return len({"\n".join(filter(None, part)) for part in lines}) == 1


def program_of(attempt: str) -> str | None:
    """The last program in an answer that defines something, or None.

    It may be fenced, between MBPP's [BEGIN] and [DONE], or bare with prose around it. The last one
    is the corrected one; but what follows a new "here is your task" is a run-on, and a block that
    only tests what stands before it is none.
    """
    text = LEFTOVER.split(attempt.replace("\r\n", "\n"))[0]
    text = MARKER.sub(lambda mark: f"\n{mark[0].strip()}\n", text)
    for task in NEW_TASK.finditer(text):
        if DEFINES.search(text, 0, task.start()):
            text = text[: task.start()]
            break
    programs = []
    for fenced, lines in blocks(text):
        for part in [lines] if fenced else bare_code(lines):
            source = textwrap.dedent("\n".join(part)).strip("\n").rstrip()
            if DEFINES.search(source):
                programs.append(source)
    programs = [p for p in programs if not TESTING.match(DEFINES.search(p)[0])] or programs
    return programs[-1] if programs else None


def blocks(text: str) -> list[tuple[bool, list[str]]]:
    """(is it fenced?, lines) of the parts of an answer, without fences in other languages."""
    found, fence, python = [(False, [])], "", True
    for line in text.split("\n"):
        mark, lines = FENCE.match(line), found[-1][1]
        if fence and line.rstrip().endswith(fence) and not within_text(lines):
            lines += [line.rstrip().removesuffix(fence)] * python
            fence, python = "", True
            found.append((False, []))
        elif not fence and mark and line.count(mark[1]) == 1 and not within_text(lines):
            fence, python = mark[1], mark[2].lower() in PYTHON
            found.append((True, []))
        elif line.strip().upper() in ("[BEGIN]", "[DONE]"):
            found.append((bool(fence), []))
        elif python:
            lines.append(line)
    return found


def bare_code(lines: list[str]) -> list[list[str]]:
    """Runs of lines that are code, where prose may stand between them."""
    parts = [[]]
    for line in lines:
        inside = parts[-1] and (not line.strip() or line[0] in " \t" or within_text(parts[-1]))
        if inside or is_code(line.strip()):
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return parts


def within_text(lines: list[str]) -> bool:
    """Do the lines end within a text of three quotes?"""
    source = "\n".join(lines)
    return source.count('"""') % 2 == 1 or source.count("'''") % 2 == 1


def is_code(line: str) -> bool:
    """Is a line Python, maybe the first of several, rather than prose?"""
    if line.startswith(("#", "@", ")", "]", "}", '"""', "'''")):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for completion in COMPLETIONS:
            try:
                found = ast.parse(completion.format(line)).body[0]
            except (SyntaxError, ValueError, IndexError, MemoryError, RecursionError):
                continue
            return not isinstance(found, ast.Expr) or isinstance(found.value, ast.Call)
    return False
