"""Which program does an answer submit?"""

import json
import time
from pathlib import Path

import pytest

from rewards import program_of, same_program

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
def test_the_program_of_an_answer(attempt, program):
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


def test_programs_are_the_same_but_for_space_at_the_end_and_empty_lines():
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
