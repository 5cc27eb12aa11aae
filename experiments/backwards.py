"""Your own task in 30 lines: words in reverse order, for Gemma 2.

    python experiments/backwards.py --task backwards

All that a task is stands in one entry of TASKS: problems, words, reward, settings. Resume with
this script, too (--resume). In tasks.py, the entry would be known to score.py and eval.py as well.
"""

import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ranks
import score
from data import Problem
from tasks import TASKS, Task, each

WORDS = "ant bee cat cow dog eel elk emu fox gnu hen owl".split()


def problems(split: str, count: int | None) -> tuple[Problem, ...]:
    """Always the same; "train" and "test" share none."""
    rng, made = random.Random(split), {}
    while len(made) < 3000:
        words = rng.sample(WORDS, 6)
        question, answer = " ".join(words), " ".join(reversed(words))
        if (zlib.crc32(question.encode()) % 10 == 0) == (split == "test"):
            made[question] = Problem(question, answer, "backwards", question)
    return tuple(made.values())[:count]


TASKS["backwards"] = Task(
    load=problems,
    first=lambda problem: f"Reverse the order of these words, say nothing else: {problem.question}",
    again="There might be an error above. Correct it, if any, and say only the words.",
    states=lambda attempt, problem: attempt or None,
    rewards=each(lambda answer, problem: answer.split() == problem.answer.split()),
    same=lambda one, two: one.split() == two.split(),
    problems=500,
    max_new_tokens=32,
    precision="bfloat16",
    rows=256,
    training={**TASKS["math"].training, "out": "runs/backwards", "steps1": 200, "steps2": 50},
)

if __name__ == "__main__":
    ranks.run_command(score.main)
