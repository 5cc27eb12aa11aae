"""Offline repair: wrong first attempts are given, and a model makes one correction of each.

For programs this is the protocol of MBPP-R (section 6). The paper takes first attempts of PaLM 2,
which are not public; here they come from a file, or from the base model. Next to read: figures.py.
"""

import sys
from pathlib import Path

from data import InputError, Problem
from runs import base_in, read_json
from sample import Attempt, Episode
from sources import read_jsonl
from tasks import TASKS, Chat


def read_attempts(path: Path, problems: list[Problem]) -> tuple[list[Problem], list[str]]:
    """Problems and first attempts from a JSONL file.

    A row is a line of an evaluation's transcripts.jsonl, or has task_id and program. Raises
    InputError for a row that is neither, or not about one of the problems.
    """
    by_id = {name: p for p in problems for name in (p.id, p.id.removeprefix("MBPP/"))}
    try:
        rows = read_jsonl(path)
    except InputError as error:
        raise InputError(f"--repair {error}") from error
    asked, attempts = [], []
    for number, row in enumerate(rows, start=1):
        problem = by_id.get(str(row.get("id", row.get("task_id"))))
        first = row.get("attempts", [{"text": row.get("program")}])
        try:
            text = first[0]["text"]
        except (TypeError, KeyError, IndexError):
            text = None
        if problem is None or not isinstance(text, str):
            raise InputError(
                f"--repair {path}, row {number}: give the id of a problem of this --split and an "
                "attempt, as in transcripts.jsonl, or task_id and program"
            )
        asked.append(problem)
        attempts.append(text)
    if not asked:
        raise InputError(f"--repair {path} holds no row: name another file")
    return asked, attempts


def begin(problems: list[Problem], attempts: list[str], chat: Chat, longest: int) -> list[Episode]:
    """Episodes of one task that begin with these attempts, less those of over `longest` tokens."""
    rewards = TASKS[problems[0].task].rewards(attempts, problems)
    episodes = []
    for problem, text, right in zip(problems, attempts, rewards, strict=True):
        tokens = [*chat.tokenizer(text, add_special_tokens=False).input_ids, chat.close_id]
        attempt = Attempt(tokens, [0.0] * len(tokens), text, True, right)
        episodes.append(Episode(problem, chat.x1(problem), (attempt,)))
    kept = [e for e in episodes if len(e.attempts[0].tokens) <= longest]
    if len(kept) < len(episodes):
        skipped = len(episodes) - len(kept)
        print(f"skipped {skipped} attempts longer than --max-new-tokens", file=sys.stderr)
    return kept


def wrong(episodes: list[Episode], source: str) -> list[Episode]:
    """Those whose attempt is wrong: there is nothing to repair in the others."""
    found = [episode for episode in episodes if not episode.attempts[0].reward]
    print(f"{len(found)} of {len(episodes)} attempts of {source} are wrong, and to be corrected")
    if not found:
        raise InputError("--repair found no wrong attempt: give others")
    return found


def base_of(model: str) -> str:
    """The base model of a checkpoint in a run folder; else the model itself."""
    run = Path(model).resolve().parent
    name = read_json(run / "config.json").get("settings", {}).get("model", model)
    return base_in(run, name)
