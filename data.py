"""What a model is asked: problems with their true answers, of four tasks.

`sums`, built in, is column addition, most significant column first; here three of seven columns:

    2+5 9+0 3+6 =        ->   7 9 9       (293 + 506)
    2+5 9+0 3+8 =        ->   8 0 1       (293 + 508: the carry runs through the nine)

The first digit needs a carry that may come from far to the right. Attempt 1 has to see it coming;
attempt 2 can read what attempt 1 wrote. sft.py tells how the built-in base model answers.

`math` is MATH, 12,000 problems to train on and MATH500 to test on; `code` is MBPP to train on and
HumanEval to test on (section 6 of the paper), from the hub or files. `answers` are your own
questions, from JSONL, CSV or Parquet files or the hub. Next to read: rewards.py.
"""

import ast
import csv
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


class InputError(Exception):
    """A mistake in a flag, a file or a model: shown as one sentence, exit status 2."""


def first_line(error: Exception) -> str:
    """The first line of a library's error, to be quoted in a sentence."""
    return str(error).strip().partition("\n")[0]


COLUMNS = 7  # of a sum; NOT IN PAPER, like all of the built-in task
SHARE_OF_NINES = 0.6  # columns that add up to 9 pass a carry on, so carries run far


@dataclass(frozen=True)
class Problem:
    """One question with its true answer; `id` is unique within the task.

    tasks.load_problems fills in the task, and the question as id if there is no id. subject and
    level are MATH's ("Algebra", "5"); the level of a sum is the length of its longest carry. tests
    are Python sources that decide if a program is right. given is the beginning of a program, which
    HumanEval's prompts have.
    """

    question: str
    answer: str | None  # None: not known
    task: str = ""
    id: str = ""
    subject: str = ""
    level: str = ""
    tests: tuple[str, ...] = ()
    given: str = ""


# --- 1. Column addition ----------------------------------------------------------------------


def add_columns(columns: list[tuple[int, int]], flipped: int | None = None) -> str:
    """The digits of a sum, highest first; the carry into column `flipped`, if any, is inverted."""
    digits, carry = [], 0
    for index in reversed(range(len(columns))):
        if index == flipped:
            carry = 1 - carry
        carry, digit = divmod(sum(columns[index]) + carry, 10)
        digits.append(digit)
    digits += [carry] if carry else []
    return " ".join(str(digit) for digit in reversed(digits))


def longest_carry(columns: list[tuple[int, int]]) -> int:
    """Columns of the longest carry: the one where it starts, and the nines that pass it on."""
    longest = run = 0
    for total in map(sum, reversed(columns)):
        run = 1 if total > 9 else run + 1 if total == 9 and run else 0
        longest = max(longest, run)
    return longest


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
def sums_problems(split: str, count: int | None) -> tuple[Problem, ...]:
    """The first `count` additions of a split, always the same; "train" and "test" share none."""
    count = 20_000 if count is None else count
    rng, problems, seen = random.Random(split), [], set()
    while len(problems) < count:
        columns = draw_columns(rng)
        question = " ".join(f"{upper}+{lower}" for upper, lower in columns) + " ="
        held_out = zlib.crc32(question.encode()) % 10 == 0  # a tenth of all sums is for testing
        if held_out == (split == "test") and question not in seen:
            seen.add(question)
            answer, level = add_columns(columns), str(longest_carry(columns))
            problems.append(Problem(question, answer, "sums", question, level=level))
    return tuple(problems)


# --- 2. MATH -----------------------------------------------------------------------------------

HUB_TRAIN, HUB_TEST = "EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory"
SUBJECTS += " prealgebra precalculus"
MATH_TEXTS = {"problem": True} | dict.fromkeys("solution answer subject type".split(), False)


@cache
def math_problems(folder: str) -> dict[str, tuple[Problem, ...]]:
    """Both splits of MATH, from JSONL files or the hub, which give the same problems and order."""
    splits = {split: as_problems(rows, split) for split, rows in math_rows(folder).items()}
    check_splits(splits, f"--data {folder}" if folder else HUB_TRAIN)
    return splits


def check_splits(splits: dict[str, tuple[Problem, ...]], source: str) -> None:
    """Raise InputError for a split without problems, and for problems that are in both."""
    for split in splits:
        if not splits[split]:
            raise InputError(f"{source} has no {split} problem with an answer: add some")
    trained_on = {words(problem.question) for problem in splits["train"]}
    clashes = [p.question for p in splits["test"] if words(p.question) in trained_on]
    if clashes:
        raise InputError(
            f"{source}: of the test problems, {len(clashes)} are in training, too, such as "
            f'"{clashes[0][:60]}": take them out of one of both'
        )


def math_rows(folder: str) -> dict[str, list[dict]]:
    """Rows of both splits: of two files, or from the hub (MATH without MATH500, and MATH500)."""
    if folder:
        names = {"train": ["train"], "test": ["test", "math500"]}
        return read_folder(Path(folder), names, MATH_TEXTS, prefer="math")
    test = from_hub("math", [(HUB_TEST, "test")])
    subjects = SUBJECTS.split()
    rows = from_hub("math", [(HUB_TRAIN, s, part) for s in subjects for part in ("train", "test")])
    held_out = {words(row["problem"]) for row in test}
    train = [row for row in rows if words(row["problem"]) not in held_out]
    if len(rows) - len(train) < len(held_out):
        raise InputError(
            f"{HUB_TRAIN} lacks problems of {HUB_TEST}, so training may hold them in other words: "
            "name a folder of JSONL files with --data"
        )
    return {"train": train, "test": test}


def as_problems(rows: list[dict], split: str) -> tuple[Problem, ...]:
    """Rows as problems, in the order of their ids; rows without question or answer are skipped."""
    problems, skipped, several = {}, 0, []
    for row in rows:
        boxed = [box for box, *_ in boxes(row.get("solution") or "")]
        answer = (row.get("answer") or (boxed[-1] if boxed else "")).strip()
        skipped += not (answer and row["problem"])
        if answer and row["problem"]:
            subject = row.get("subject") or row.get("type") or ""
            level = re.sub(r"^Level ", "", str(row.get("level") or ""))
            key = hashlib.blake2b(row["problem"].encode(), digest_size=8).hexdigest()
            problems[key] = Problem(row["problem"], answer, "math", key, subject, level)
            several += [key] * (len(set(boxed)) > 1)
    if skipped:
        print(f"skipped {skipped} {split} problems without an answer", file=sys.stderr)
    if several:
        known = ", ".join(several[:3])
        words = "have several boxes in their solution (if the row has no answer, the last counts)"
        print(f"{len(several)} {split} problems {words}, such as {known}", file=sys.stderr)
    return tuple(problems[key] for key in sorted(problems))


MARKS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> list[tuple[str, int, int]]:
    r"""What stands in each balanced \boxed{..} or \fbox{..} of a text, its start and its end."""
    opened, found = [], []
    for mark in MARKS.finditer(text):
        if mark[0][-1] == "{" and mark[0] != r"\{":
            opened.append(mark)
        elif mark[0] == "}" and opened:
            opening = opened.pop()
            if len(opening[0]) > 1:
                inside = text[opening.end() : mark.start()].strip()
                found.append((inside, opening.start(), mark.end()))
    return found


def last_box(text: str) -> str | None:
    r"""What stands in the last balanced \boxed{..} or \fbox{..} of a text, or None."""
    return boxes(text)[-1][0] if boxes(text) else None


def words(question: str) -> str:
    """A question with single spaces only, so that line breaks make no difference."""
    return " ".join(question.split())


# --- 3. Your own questions -----------------------------------------------------------------------

LONG_ANSWER = 100  # letters; longer ones look like solutions without a final answer
TABLES = ("*.jsonl", "*.jsonl.gz", "*.csv", "*.parquet")


@cache
def own_problems(source: str, columns: str) -> dict[str, tuple[Problem, ...]]:
    """Both splits of a folder, or of "owner/name" or "owner/name:configuration" on the hub.

    columns: "question,answer". An answer may end in "#### 42", as GSM8K's do, or in a box.
    """
    if not source:
        raise InputError("--task answers needs --data: name a folder or a data set of the hub")
    question, _, answer = (part.strip() for part in columns.partition(","))
    if not question or not answer or "," in answer:
        raise InputError(f"--columns {columns} must name two: of questions, and of answers")
    texts, names = {question: True, answer: True}, {"train": ["train"], "test": ["test"]}
    if Path(source).is_dir() or source.count("/") != 1:
        found = read_folder(Path(source), names, texts, files=TABLES)
    else:
        name, _, configuration = source.partition(":")
        parts = {split: (name, *filter(None, [configuration]), split) for split in names}
        found = {split: from_hub("answers", [part]) for split, part in parts.items()}
        found = {n: with_texts(rows, texts, f"{source}, {n} row") for n, rows in found.items()}
    splits = {split: own_rows(rows, *texts, split) for split, rows in found.items()}
    check_splits(splits, f"--data {source}")
    return splits


def own_rows(rows: list[dict], question: str, answer: str, split: str) -> tuple[Problem, ...]:
    """Rows as problems; rows without question or answer, and repeated questions, are left out."""
    found, lacking, repeated = {}, [], []
    for row in rows:
        final = (row[answer] or "").rpartition("####")[2]
        final = (last_box(final) or final).strip()
        key = words(row[question] or "")
        if not key or not final:
            lacking.append(row)
        elif key in found:
            repeated.append(row)
        else:
            level, subject = (str(row.get(name) or "") for name in ("level", "subject"))
            found[key] = Problem(row[question], final, "answers", key, subject, level)
    for rows_left, why in (
        (lacking, "without question or answer"),
        (repeated, "that repeat a question"),
    ):
        if rows_left:
            first = [rows_left[0][question], rows_left[0][answer]]
            print(f"left out {len(rows_left)} {split} rows {why}, such as {first}", file=sys.stderr)
    long = [p.answer for p in found.values() if len(p.answer) > LONG_ANSWER]
    if long:
        words_ = (
            f"{len(long)} {split} answers are over {LONG_ANSWER} letters, such as {long[0]!r:.60}"
        )
        print(f"{words_}: a solution has to end in #### ANSWER or in a box", file=sys.stderr)
    return tuple(found.values())


# --- 4. MBPP and HumanEval ---------------------------------------------------------------------

HUB_MBPP, HUB_HUMANEVAL = "google-research-datasets/mbpp", "openai/openai_humaneval"
SHOTS = (2, 3, 4)  # MBPP's ids that the three-shot prompt shows (appendix C)
MBPP_TEST = range(11, 511)  # its own test split
HUMANEVAL_TEXTS = dict.fromkeys("prompt canonical_solution test entry_point".split(), True)
CODE_TEXTS = {"mbpp": {"text": True, "code": True}, "humaneval": HUMANEVAL_TEXTS}


def code_problems(split: str, folder: str, ids: str) -> tuple[Problem, ...]:
    """HumanEval ("test"), MBPP's own test split ("mbpp"), or its problems `ids` ("train")."""
    mbpp, humaneval = read_code(folder)
    if split == "test":
        return humaneval
    wanted = MBPP_TEST if split == "mbpp" else read_ids(ids)
    found = tuple(mbpp[number] for number in wanted if number in mbpp)
    if not found:
        asked = f"--ids {ids}" if split == "train" else "11-510"
        raise InputError(f"{folder or HUB_MBPP} has no problem of {asked}: name others")
    return found


@cache
def read_code(folder: str) -> tuple[dict[int, Problem], tuple[Problem, ...]]:
    """MBPP by number, and HumanEval, from two files or from the hub."""
    if folder:
        files = CODE_TEXTS.items()
        mbpp, humaneval = (read_folder(Path(folder), {n: [n]}, texts)[n] for n, texts in files)
    else:
        parts = [(HUB_MBPP, "full", part) for part in ("prompt", "test", "validation", "train")]
        mbpp, humaneval = from_hub("code", parts), from_hub("code", [(HUB_HUMANEVAL, "test")])
    by_number = {
        int(row["task_id"]): p for row, p in rows_with_problems(mbpp, mbpp_problem, folder)
    }
    return by_number, tuple(p for _, p in rows_with_problems(humaneval, humaneval_problem, folder))


def rows_with_problems(rows: list[dict], make, folder: str):
    """Yield each row and its problem; InputError names a row with a wrong value."""
    for row in rows:
        try:
            problem = make(row)
            ast.parse("\n".join(problem.tests))
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise InputError(
                f"{folder or 'the hub'}: task_id {row.get('task_id')} is not a row of MBPP or "
                f"HumanEval ({error!r}): correct it"
            ) from error
        yield row, problem


@cache
def read_ids(ids: str) -> tuple[int, ...]:
    """ "5,511-513" -> (5, 511, 512, 513); InputError for another form, and for ids of SHOTS."""
    numbers: set[int] = set()
    for part in ids.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            low = high = 0
        if not 0 < low <= high < 10_000:
            raise InputError(f"--ids {ids} is no list of ids: give some such as 511-974")
        numbers |= set(range(low, high + 1))
    if numbers & set(SHOTS):
        raise InputError(f"--ids {ids} has one of {SHOTS}, which every prompt shows: leave it out")
    if numbers & set(MBPP_TEST):
        print(f"--ids {ids} spoils --split mbpp, 11-510, as a test of this model", file=sys.stderr)
    return tuple(sorted(numbers))


def mbpp_problem(row: dict) -> Problem:
    """A row of MBPP; the question ends with the tests, as the paper's prompt shows them."""
    shown = row["test_list"]
    if not isinstance(shown, list) or not shown:
        raise TypeError("test_list is no list of tests")
    question = f"{row['text']} Your code should pass these tests:\n\n" + "\n".join(shown)
    tests = (row.get("test_setup_code") or "", *shown)
    return Problem(question, row["code"], "code", f"MBPP/{int(row['task_id'])}", tests=tests)


def humaneval_problem(row: dict) -> Problem:
    """A row of HumanEval; its preamble runs again with the tests: no program can change it."""
    prompt = row["prompt"]
    tests = (preamble(prompt), row["test"], f"check({row['entry_point']})")
    right = prompt + row["canonical_solution"]
    return Problem(prompt, right, "code", row["task_id"], tests=tests, given=prompt)


def preamble(prompt: str) -> str:
    """What stands before the last function of a HumanEval prompt: imports, helpers of the tests."""
    return f"\n{prompt}".rpartition("\ndef ")[0] + "\n"


# --- 5. Files and the hub -----------------------------------------------------------------------


def read_folder(
    folder: Path, names: dict, texts: dict[str, bool], prefer: str = "", files=TABLES[:2]
) -> dict[str, list]:
    """The rows of one file for each key of `names`.

    The file has one of the parts names[key] in its name; if several have, those with `prefer` in
    their names count. texts: the keys of a row that hold texts, and whether each must be there.
    files: patterns of file names.
    """
    kinds = ", ".join(pattern[1:] for pattern in files)
    if not folder.is_dir():
        raise InputError(f"--data {folder} is no folder: name the one that holds the {kinds} files")
    found = {}
    for key, parts in names.items():
        paths = sorted(path for pattern in files for path in folder.glob(pattern))
        paths = [path for path in paths if any(part in path.name.lower() for part in parts)]
        paths = [path for path in paths if prefer in path.name.lower()] or paths
        if len(paths) != 1:
            raise InputError(
                f"--data {folder} needs exactly one file ({kinds}) with {' or '.join(parts)} in "
                f"its name, but has {', '.join(path.name for path in paths) or 'none'}"
            )
        found[key] = read_table(paths[0], texts)
    return found


def read_table(path: Path, texts: dict[str, bool]) -> list[dict]:
    """The rows of a JSONL, CSV or Parquet file; InputError for one that cannot be read."""
    if path.suffix == ".csv":
        rows = csv.DictReader(read_text(path).splitlines(keepends=True), restkey="")
        if len(names := rows.fieldnames or ()) == 1:
            raise InputError(f"{path} has one column, {names[0]!r:.60}: put commas between columns")
        rows = list(rows)
        for number, row in enumerate(rows, start=1):
            if "" in row or None in row.values():
                raise InputError(
                    f"{path}, row {number} has more or fewer cells than the first line: put "
                    f"texts with commas into quotes; it is {list(row.values())!r:.80}"
                )
    elif path.suffix == ".parquet":
        rows = load_parts([("parquet", "train")], str(path), data_files=str(path))
    else:
        return read_jsonl(path, texts)
    return with_texts(rows, texts, f"{path}, row")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, compressed by gzip or not, with or without a byte order mark."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): correct it or name another") from error


def read_jsonl(path: Path, texts: dict[str, bool] | None = None) -> list[dict]:
    """The objects of a JSONL file; InputError names a bad line.

    Only a line feed ends a line: JSON strings may hold the other line ends of Unicode.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except (ValueError, RecursionError) as error:
            start = f"{line.strip()[:40]!r}"
            raise InputError(
                f"{path}, line {number} begins {start}, which is no JSON ({error}): correct it"
            ) from error
    return with_texts(rows, texts or {}, f"{path}, line")


def with_texts(rows: list, texts: dict[str, bool], source: str) -> list[dict]:
    """The rows that are not empty; numbers under the keys of `texts` become texts.

    Raises InputError for a row that is no object, lacks a key, or has a value that is no text.
    """
    for number, row in enumerate(rows, start=1):
        where = f"{source} {number}"
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{where} is {row!r:.40}, no JSON object: write one in each line")
        for key in texts if row else ():
            value = row.get(key)
            if texts[key] and key not in row:
                found = ", ".join(map(repr, row))
                remedy = "rename one, or for --task answers give --columns QUESTION,ANSWER"
                raise InputError(f"{where} has no {key!r}, only {found}: {remedy}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                row[key] = str(value)
            elif value is not None and not isinstance(value, str):
                raise InputError(f"{where}: {key!r} is {value!r:.40}, no text: correct it")
    return [row for row in rows if row]


def from_hub(task: str, parts: list[tuple]) -> list[dict]:
    """The rows of some parts of data sets, each (name, split) or (name, configuration, split)."""
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # hides its reports of retries
    hint = "allow the network, or name a folder of files with --data"
    return load_parts(parts, f"--task {task}, from the Hugging Face hub,", hint)


def load_parts(parts: list[tuple], source: str, hint: str = "correct it", **settings) -> list[dict]:
    """The rows of parts of anything that load_dataset reads; InputError names the source."""
    from datasets import load_dataset  # slow to import, and not needed for the built-in task

    try:
        return [r for *name, split in parts for r in load_dataset(*name, split=split, **settings)]
    except Exception as error:  # without a network, of any kind
        raise InputError(f"{source} cannot be read ({first_line(error)}): {hint}") from error
