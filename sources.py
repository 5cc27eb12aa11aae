"""Where problems come from: JSONL files, or the Hugging Face hub. Next to read: data.py."""

import gzip
import json
import logging
import re
import zlib
from pathlib import Path


class InputError(Exception):
    """A mistake in a flag, a file or a model: shown as one sentence, exit status 2."""


def read_folder(folder: Path, names: dict[str, list[str]], texts: list[str]) -> dict[str, list]:
    """Rows of one file for each key of `names`: a file that has one of these in its name.

    texts: keys of a row that hold texts or are absent; the first must be there.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder} is no folder: name one with JSONL files")
    found = {}
    for key, parts in names.items():
        files = sorted(folder.glob("*.jsonl*"))
        files = [path for path in files if any(part in path.name.lower() for part in parts)]
        if len(files) != 1:
            raise InputError(
                f"--data {folder} needs one JSONL file (.jsonl or .jsonl.gz) with "
                f"{' or '.join(parts)} in its name, but has {len(files)}"
            )
        found[key] = read_jsonl(files[0], texts)
    return found


def read_jsonl(path: Path, texts: list[str] | tuple = ()) -> list[dict]:
    """The objects of a JSONL file, less those whose first text is empty; a bad line is named."""
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
            if row and not all(isinstance(row.get(key) or "", str) for key in texts):
                raise TypeError("not a text")
            rows += [row] if row and all(row[key] for key in texts[:1]) else []
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            needed = "".join(f" with a {key}, all texts" for key in texts[:1])
            raise InputError(
                f"{path}, line {number}, is no JSON object{needed}: mend it"
            ) from error
    return rows


def read_ids(ids: str) -> set[int]:
    """ "2,511-513" -> {2, 511, 512, 513}; InputError for what is no such list."""
    numbers: set[int] = set()
    for part in ids.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            low = high = 0
        if not 0 < low <= high < 10_000:
            raise InputError(f"--ids {ids} is no list of numbers such as 511-974")
        numbers |= set(range(low, high + 1))
    return numbers


def from_hub(task: str, parts: list[tuple]) -> list[dict]:
    """The rows of some parts of data sets, each (name, split) or (name, configuration, split)."""
    from datasets import load_dataset  # slow to import, and not needed for the built-in task

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it counts its retries
    try:
        return [row for *name, split in parts for row in load_dataset(*name, split=split)]
    except Exception as error:  # whatever an absent network raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--task {task} cannot be read from the Hugging Face hub ({reason}): allow the "
            "network, or name a folder of JSONL files with --data"
        ) from error


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
