"""What is asked: problems, the two prompts, and the token ids that frame an attempt.

SCoRe asks twice. Everything is joined as tokens, never by decoding and tokenising again:

    x1 = [bos, question, template ...]      the first prompt, from the model's own chat template
    y1 = [...] + end token                  attempt 1, sampled
    p1 = [template, instruction, ...]       asks for another attempt: "There might be an error ..."
    x2 = x1 + y1 + p1                       the second prompt
    y2 = [...] + end token                  attempt 2, sampled

A task is its problems (`load_problems`), its words (`TASKS`) and a reward (rewards.py).

`sums`, built in, is column addition, most significant column first; here with three of the eight
columns:

    2+5 9+0 3+6 =        ->   7 9 9       (293 + 506)
    2+5 9+0 3+8 =        ->   8 0 1       (293 + 508: the carry runs through the nine)

The first digit needs a carry that may come from far to the right. Attempt 1 has to see it coming;
attempt 2 can read what attempt 1 wrote.

`math` is MATH, 12,000 problems to train on and the 500 of MATH500 to test on (section 6 and
appendix C of the paper), from the hub or from files. Next to read: expressions.py.
"""

import gzip
import hashlib
import json
import logging
import random
import re
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COLUMNS = 8  # of a sum; NOT IN PAPER, like all of the built-in task
SHARE_OF_NINES = 0.5  # columns that add up to 9 pass a carry on, so carries run far

MATH_FORM = (
    "At the end of the Solution, when you give your final answer, write it in the form "
    '"Final Answer: The final answer is $answer$. I hope it is correct."'
)
MATH_PROMPT = (
    "You are a math expert. When you respond, respond only with the Solution of the final Problem, "
    f"thinking step by step. {MATH_FORM}"
)
MATH_CORRECTION = (
    "There might be an error in the solution above because of lack of understanding of the "
    "question. Please correct the error, if any, and rewrite the solution. Only output the final "
    f"solution! {MATH_FORM}"
)


@dataclass(frozen=True)
class Task:
    """How a task asks, {} being the question, and asks again; and how it is evaluated.

    problems: held out. max_new_tokens: of one attempt. precision: of the weights. rows: attempted
    side by side. Each is a flag of eval.py, and of score.py.
    """

    first: str
    again: str
    problems: int
    max_new_tokens: int
    precision: str
    rows: int


TASKS = {
    "sums": Task("{}", "again =", 2000, 10, "float32", 500),
    # NOT STATED: where the question stands, and whether as a system or a user message.
    "math": Task(f"{MATH_PROMPT}\n\nProblem: {{}}", MATH_CORRECTION, 500, 1024, "bfloat16", 64),
}


class InputError(Exception):
    """A mistake in a flag, a file or a model: shown as one sentence, exit status 2."""


@dataclass(frozen=True)
class Problem:
    """One question with its true answer; `id` is unique within the task.

    subject and level are MATH's, such as "Algebra" and "5"; empty for other tasks.
    """

    question: str
    answer: str
    task: str
    id: str
    subject: str = ""
    level: str = ""


def load_problems(task: str, split: str, count: int | None = None, folder: str = "") -> tuple:
    """The first `count` problems of a task's "train" or "test" split, always in the same order.

    folder: of MATH's files, "" for the hub. Raises InputError where there is nothing to read.
    """
    check_task(task, folder)
    if task == "math":
        return math_problems(folder)[split][:count]
    return sums_problems(split, 20_000 if count is None else count)


def check_task(task: str, folder: str) -> None:
    """Raise InputError for a task that there is not, or one that takes no --data `folder`."""
    if task not in TASKS:
        raise InputError(f"--task {task} is unknown: choose {' or '.join(TASKS)}")
    if folder and task != "math":
        raise InputError(f"--data {folder} is for --task math: add that, or leave out --data")


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


# --- 2. MATH -----------------------------------------------------------------------------------

HUB_TRAIN, HUB_TEST = "EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"
SUBJECTS = (
    "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra "
    "precalculus"
)


@cache
def math_problems(folder: str) -> dict[str, tuple[Problem, ...]]:
    """Both splits, from JSONL files or the hub: the same problems in the same order."""
    rows = read_folder(Path(folder)) if folder else download()
    splits = {split: as_problems(rows[split], split) for split in ("train", "test")}
    for split in splits:
        if not splits[split]:
            raise InputError(f"--data {folder}: the {split} file holds no problem with an answer")
    trained_on = {words(problem.question) for problem in splits["train"]}
    clashes = [p.question for p in splits["test"] if words(p.question) in trained_on]
    if clashes:
        raise InputError(
            f"{folder or HUB_TRAIN}: {len(clashes)} problems are in training and in test, such as "
            f'"{clashes[0][:60]}": take them out of the training file, or name another --data'
        )
    return splits


def as_problems(rows: list[dict], split: str) -> tuple[Problem, ...]:
    """Rows of either source as problems, in the order of their ids; without an answer: skipped."""
    problems, skipped = {}, 0
    for row in rows:
        answer = (row.get("answer") or last_box(row.get("solution") or "") or "").strip()
        skipped += not answer
        if answer:
            subject = row.get("subject") or row.get("type") or ""
            level = re.sub(r"^Level ", "", str(row.get("level") or ""))
            key = hashlib.blake2b(row["problem"].encode(), digest_size=8).hexdigest()
            problems[key] = Problem(row["problem"], answer, "math", key, subject, level)
    if skipped:
        print(f"skipped {skipped} {split} problems without an answer", file=sys.stderr)
    return tuple(problems[key] for key in sorted(problems))


def words(question: str) -> str:
    """A question without regard to its spaces and line breaks."""
    return " ".join(question.split())


MARKS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""What stands in the last balanced \boxed{..} or \fbox{..} of a text, or None."""
    opened, box = [], None
    for mark in MARKS.finditer(text):
        if mark[0][-1] == "{" and mark[0] != r"\{":
            opened.append(mark)
        elif mark[0] == "}" and opened:
            opening = opened.pop()
            if len(opening[0]) > 1:
                box = text[opening.end() : mark.start()].strip()
    return box


def download() -> dict[str, list[dict]]:
    """Both splits from the hub: all of MATH less MATH500, and MATH500."""
    from datasets import load_dataset  # slow to import, and not needed for the built-in task

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it counts its retries
    try:
        test = list(load_dataset(HUB_TEST, split="test"))
        rows = [
            row
            for subject in SUBJECTS.split()
            for split in ("train", "test")
            for row in load_dataset(HUB_TRAIN, subject, split=split)
        ]
    except Exception as error:  # whatever an absent network raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--task math cannot be read from the Hugging Face hub ({reason}): allow the network, "
            "or name a folder of JSONL files with --data"
        ) from error
    held_out = {words(row["problem"]) for row in test}
    train = [row for row in rows if words(row["problem"]) not in held_out]
    if len(rows) - len(train) < len(held_out):
        raise InputError(
            f"{HUB_TRAIN} lacks problems of {HUB_TEST}, so training would see them in other words: "
            "name a folder of JSONL files with --data"
        )
    return {"train": train, "test": test}


TEXTS = ("problem", "solution", "answer", "subject", "type")


def read_folder(folder: Path) -> dict[str, list[dict]]:
    """Both splits from a folder: one file has "train" in its name, one "test" or "math500"."""
    splits = {}
    for split, names in {"train": ["train"], "test": ["test", "math500"]}.items():
        files = sorted(folder.glob("*.jsonl*"))
        found = [path for path in files if any(name in path.name for name in names)]
        if len(found) != 1:
            raise InputError(
                f"--data {folder} needs one JSONL file (.jsonl or .jsonl.gz) with "
                f"{' or '.join(names)} in its name, but has {len(found)}"
            )
        splits[split] = read_jsonl(found[0])
    return splits


def read_jsonl(path: Path) -> list[dict]:
    """Rows with a "problem" and a "solution" or an "answer", all texts; a bad line is named."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): mend it or name another") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = dict(json.loads(line)) if line.strip() else None
            if row and not all(isinstance(row.get(key) or "", str) for key in TEXTS):
                raise TypeError("not a text")
            rows += [row] if row and row["problem"] else []
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}, is no JSON object with a problem, all texts: mend it"
            ) from error
    return rows


# --- 3. Prompts as token ids -----------------------------------------------------------------

# For base models, which have no chat template. NOT STATED: any layout.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'user' %}{{ '\n\nSolution:' }}"
    "{% else %}{{ eos_token + '\n\n' }}{% endif %}{% endfor %}"
)


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
        question = TASKS[problem.task].first.format(problem.question)
        text = _render(self.tokenizer, [{"role": "user", "content": question}])
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, tokens: list[int]) -> str:
        """An attempt as text, without its end token; stray special tokens stay visible."""
        ended = bool(tokens) and tokens[-1] in self.end_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens).strip()


def _render(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def read_chat(tokenizer, model, task: str) -> Chat:
    """The Chat of a model: p1 and the end tokens, read from template and configs together.

    A tokenizer without a chat template gets the plain one. Raises InputError if there is no token
    that could end an attempt.
    """
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    marker = "ATTEMPT"
    messages = [
        {"role": "user", "content": "QUESTION"},
        {"role": "assistant", "content": marker},
        {"role": "user", "content": TASKS[task].again},
    ]
    after = _render(tokenizer, messages).partition(marker)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    listed = [tokenizer.eos_token_id, model.config.eos_token_id]
    listed.append(model.generation_config.eos_token_id if model.can_generate() else None)
    end_ids = {i for one in listed for i in (one if isinstance(one, list) else [one])} - {None}
    if not ids or ids[0] not in end_ids | set(tokenizer.all_special_ids):
        raise InputError(
            f"{tokenizer.name_or_path} has no end token: its chat template must close an answer "
            "with one, or its tokenizer name an eos_token"
        )
    return Chat(tokenizer, ids[1:], tuple(sorted(end_ids | {ids[0]})), ids[0])
