"""What is asked: problems, the two prompts, and the token ids that frame an attempt.

SCoRe asks twice. Everything is joined as tokens, never by decoding and tokenising again:

    x1 = [bos, question, template ...]      the first prompt, from the model's own chat template
    y1 = [...] + end token                  attempt 1, sampled
    p1 = [template, instruction, ...]       asks for another attempt; here just "again ="
    x2 = x1 + y1 + p1                       the second prompt
    y2 = [...] + end token                  attempt 2, sampled

A task is its problems (`load_problems`), an instruction (`INSTRUCTION`) and a reward (rewards.py).
The built-in one, `sums`, is column addition, most significant column first; here with three of the
eight columns:

    2+5 9+0 3+6 =        ->   7 9 9       (293 + 506)
    2+5 9+0 3+8 =        ->   8 0 1       (293 + 508: the carry runs through the nine)

The first digit needs a carry that may come from far to the right. Attempt 1 has to see it coming;
attempt 2 can read what attempt 1 wrote. Next to read: rewards.py.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cache

COLUMNS = 8  # of a problem; NOT IN PAPER, like all of the built-in task
SHARE_OF_NINES = 0.5  # columns that add up to 9 pass a carry on, so carries run far

INSTRUCTION = {"sums": "again ="}  # what asks for the next attempt, by task


class InputError(Exception):
    """A mistake in a flag, a file or a model: shown as one sentence, exit status 2."""


@dataclass(frozen=True)
class Problem:
    """One question with its true answer; `id` is unique within the task."""

    question: str
    answer: str
    task: str
    id: str


# --- 1. Column addition ----------------------------------------------------------------------


def add_columns(columns: list[tuple[int, int]], flipped: int | None = None) -> str:
    """Digits of the sum, most significant first; the carry into column `flipped` is taken wrong.

    Args: columns, (upper, lower) digits, most significant first; flipped, an index into them.
    """
    digits, carry = [], 0
    for index in reversed(range(len(columns))):
        if index == flipped:
            carry = 1 - carry
        carry, digit = divmod(sum(columns[index]) + carry, 10)
        digits.append(digit)
    digits += [carry] if carry else []
    return " ".join(str(digit) for digit in reversed(digits))


def draw_columns(rng: random.Random) -> list[tuple[int, int]]:
    """One addition of COLUMNS columns; neither number begins with a zero."""
    upper = rng.randint(1, 7)
    columns = [(upper, rng.randint(1, 8 - upper))]
    while len(columns) < COLUMNS:
        upper = rng.randint(0, 9)
        nine = rng.random() < SHARE_OF_NINES
        columns.append((upper, 9 - upper if nine else rng.randint(0, 9)))
    return columns


@cache
def sums_problems(split: str, count: int) -> tuple[Problem, ...]:
    """The first `count` additions of a split, always the same; "train" and "test" share none."""
    rng, problems, seen = random.Random(split), [], set()
    while len(problems) < count:
        columns = draw_columns(rng)
        question = " ".join(f"{upper}+{lower}" for upper, lower in columns) + " ="
        held_out = zlib.crc32(question.encode()) % 10 == 0  # a tenth of all sums is for testing
        if held_out == (split == "test") and question not in seen:
            seen.add(question)
            problems.append(Problem(question, add_columns(columns), "sums", question))
    return tuple(problems)


def load_problems(task: str, split: str, count: int = 20_000) -> tuple[Problem, ...]:
    """The first `count` problems of a task's "train" or "test" split."""
    check_task(task)
    return sums_problems(split, count)


def check_task(task: str) -> None:
    """Raise InputError for a task that there is not."""
    if task not in INSTRUCTION:
        raise InputError(f"--task {task} is unknown: choose {' or '.join(INSTRUCTION)}")


# --- 2. Prompts as token ids -----------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the ids that frame an attempt of its model.

    p1: what stands between an attempt's end token and the next attempt. end_ids: every token that
    ends an attempt (Gemma: 1 and 107). close_id: the one that the chat template itself writes; it
    closes an attempt that was cut off.
    """

    tokenizer: object
    p1: list[int]
    end_ids: tuple[int, ...]
    close_id: int

    def x1(self, problem: Problem) -> list[int]:
        """The first prompt's token ids; the template writes the one BOS."""
        text = _render(self.tokenizer, [{"role": "user", "content": problem.question}])
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, tokens: list[int]) -> str:
        """An attempt as text, without its end token; stray special tokens stay visible."""
        ended = bool(tokens) and tokens[-1] in self.end_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens).strip()


def _render(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def read_chat(tokenizer, model, task: str) -> Chat:
    """The Chat of a model: p1 and the end tokens, read from template and configs together.

    Raises InputError if there is no chat template, or no token that could end an attempt.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(f"{name} has no chat template: choose an instruction-tuned model")
    marker = "ATTEMPT"
    messages = [
        {"role": "user", "content": "QUESTION"},
        {"role": "assistant", "content": marker},
        {"role": "user", "content": INSTRUCTION[task]},
    ]
    after = _render(tokenizer, messages).partition(marker)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    listed = [tokenizer.eos_token_id, model.config.eos_token_id]
    listed.append(model.generation_config.eos_token_id if model.can_generate() else None)
    end_ids = {i for one in listed for i in (one if isinstance(one, list) else [one])} - {None}
    if not ids or ids[0] not in end_ids | set(tokenizer.all_special_ids):
        raise InputError(
            f"{name} has no end token: its chat template must close an answer with one"
        )
    return Chat(tokenizer, ids[1:], tuple(sorted(end_ids | {ids[0]})), ids[0])
