"""Offline repair: wrong first attempts are given, and a model makes one correction of each.

For programs this is the protocol of MBPP-R (section 6). The paper takes first attempts of PaLM 2,
which are not public; here they come from a file, or from the base model. Next to read: eval.py.
"""

from pathlib import Path

from data import InputError, Problem
from runs import read_json
from sample import Attempt, Episode
from sources import read_jsonl
from tasks import TASKS, Chat


def begin_wrong(problems: list[Problem], attempts: list[str], chat: Chat) -> list[Episode]:
    """Episodes that begin with those of the attempts that are wrong; problems are one task's."""
    rewards = TASKS[problems[0].task].rewards(attempts, problems)
    episodes = []
    for problem, text, right in zip(problems, attempts, rewards, strict=True):
        tokens = [*chat.tokenizer(text, add_special_tokens=False).input_ids, chat.close_id]
        attempt = Attempt(tokens, [0.0] * len(tokens), text, True, right)
        episodes += [] if right else [Episode(problem, chat.x1(problem), (attempt,))]
    if not episodes:
        raise InputError("--repair found no wrong attempt: give others")
    return episodes


def read_attempts(path: Path, problems: list[Problem]) -> tuple[list[Problem], list[str]]:
    """Problems and first attempts from a JSONL file.

    A row is a line of an evaluation's transcripts.jsonl, or has task_id and program. Raises
    InputError for a row that is neither, or not about one of the problems.
    """
    by_id = {name: p for p in problems for name in (p.id, p.id.rpartition("/")[2])}
    asked, attempts = [], []
    for number, row in enumerate(read_jsonl(path), start=1):
        problem = by_id.get(str(row.get("id", row.get("task_id"))))
        first = (row.get("attempts") or [{"text": row.get("program")}])[0]
        text = first.get("text") if isinstance(first, dict) else None
        if problem is None or not isinstance(text, str):
            raise InputError(
                f"--repair {path}, row {number}: give the id of a problem of this split and an "
                "attempt, as in transcripts.jsonl, or task_id and program"
            )
        asked.append(problem)
        attempts.append(text)
    if not asked:
        raise InputError(f"--repair {path} holds no row: name another file")
    return asked, attempts


def base_of(model: str) -> str:
    """The base model of a checkpoint in a run folder; else the model itself."""
    run = Path(model).parent
    name = read_json(run / "config.json").get("settings", {}).get("model", model)
    return str(run / "base") if name == "builtin" else name
