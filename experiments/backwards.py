"""A task of your own: Gemma 2 learns to say words in reverse order.

python score.py --task experiments/backwards.py
python eval.py --task experiments/backwards.py --model runs/backwards/stage2
"""

import random
import zlib

from tasks import TASKS, Problem, Task, each

WORDS = "ant bee cat cow dog eel elk emu fox gnu hen owl".split()


def problems(split, count):
    """Always the same; "train" and "test" share none."""
    rng, made = random.Random(split), {}
    while len(made) < 3000:
        words = rng.sample(WORDS, 6)
        question, answer = " ".join(words), " ".join(reversed(words))
        if (zlib.crc32(question.encode()) % 10 == 0) == (split == "test"):
            made[question] = Problem(question, answer)
    return tuple(made.values())[:count]


TASK = Task(
    load=problems,
    first=lambda problem: f"Reverse the order of these words, say nothing else: {problem.question}",
    again="There might be an error above. Correct it, if any, and say only the words.",
    states=lambda attempt, problem: attempt or None,  # the answer in it; None: there is none
    rewards=each(lambda answer, problem: answer.split() == problem.answer.split()),
    same=lambda one, two: one.split() == two.split(),
    problems=500,  # held out
    max_new_tokens=32,
    precision="bfloat16",
    rows=256,  # sampled side by side
    training={**TASKS["math"].training, "out": "runs/backwards", "steps1": 200, "steps2": 50},
)
