"""How good is it? A model attempts held-out problems, and its attempts are measured.

    python eval.py --model runs/sums/stage2                 greedy, two attempts, 2,000 problems
    python eval.py --model runs/sums/stage2 --attempts 4    more attempts than in training
    python eval.py --model runs/math/stage2 --task math     MATH500, by level and by subject too
    python eval.py --model runs/code/stage2 --task code     HumanEval; MBPP with --split mbpp
    python eval.py --model runs/code/stage2 --task code --split mbpp --repair
    python eval.py --model runs/sums/stage2 --samples 16    votes: sample more, or correct?
    python eval.py --model runs/sums/base --refine          Self-Refine: prompts alone
    python eval.py --model runs/sums/stage2 --ask "4+7 9+0 3+8 1+2 5+4 6+3 2+2 ="
    python eval.py --report runs/sums                       a page about the run; --plot: pictures

Votes (section 6.2): at a budget of 2k samples of a problem, `parallel` is a vote among 2k first
attempts. `sequential` is a vote among k second attempts, which correct k of these first attempts
(NOT STATED: who votes in the second). Repair is the protocol of MBPP-R (section 6). The first
attempts that the paper gives are not public; here they come from a file or from the base model.
Next to read: metrics.py.
"""

import json
import sys

from config import (
    COLDEST,
    Config,
    as_flag,
    check_precision,
    exit_early,
    parse_eval_flags,
    with_absolute_paths,
)

if __name__ == "__main__":  # --help, mistyped flags and Ctrl-C do not wait for torch
    exit_early("eval.py", parse_eval_flags, __doc__)

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import figures
import models
import ranks
import report
from data import InputError, Problem, read_jsonl
from lora import base_of, load_checkpoint, whole_of
from metrics import as_table, by_group, evaluate, intervals, measure
from runs import (
    as_words,
    changed_inputs,
    disk_errors_explained,
    locked,
    of_this_version,
    read_json,
    write_atomically,
)
from sample import Attempt, Episode, Sampling, askable, check_sampling, rollout
from tasks import (
    Chat,
    agree,
    check_task,
    find_task,
    judge,
    load_problems,
    read_chat,
    refining,
    wording_of,
)

# --- 1. Votes: is it better to sample more, or to correct? ---------------------------------------


def vote(attempts: list[Attempt], task: str) -> float:
    """1.0 if the answer that most attempts state is right, else 0.0; the first one wins a tie."""
    groups: list[list[Attempt]] = []
    for attempt in attempts:
        same = (group for group in groups if agree(group[0].stated, attempt.stated, task))
        group = next(same, None)
        if group is not None:
            group.append(attempt)
        elif attempt.stated is not None:
            groups.append([attempt])
    return max(groups, key=len)[0].reward if groups else 0.0


def compare_votes(evaluate, problems: list, samples: int, sampling: Sampling) -> list[dict]:
    """The accuracy of both votes at budgets of 2, 4, 8 .. 2 `samples`, one line for each budget.

    evaluate(problems, sampling, begun) returns the model's episodes and their metrics.
    """
    asked = [problem for problem in problems for _ in range(2 * samples)]
    first, _ = evaluate(asked, replace(sampling, attempts=1), ())
    rows = [first[i : i + 2 * samples] for i in range(0, len(first), 2 * samples)]
    begun = [episode for row in rows for episode in row[:samples]]
    second, _ = evaluate([e.problem for e in begun], replace(sampling, attempts=2), begun)
    corrected = [second[i : i + samples] for i in range(0, len(second), samples)]
    sizes = sorted({samples} | {2**n for n in range(samples.bit_length())})
    lines = []
    for k in sizes:
        votes = {
            "parallel": [[e.attempts[0] for e in row[: 2 * k]] for row in rows],
            "sequential": [[e.attempts[1] for e in row[:k]] for row in corrected],
        }
        line = {"budget": 2 * k, "problems": len(rows)}
        for name, ballots in votes.items():
            task = rows[0][0].problem.task
            line[name] = sum(vote(ballot, task) for ballot in ballots) / len(rows)
        lines.append(line)
    return lines


def votes_table(lines: list[dict]) -> str:
    """The lines of `compare_votes` as a table to print."""
    rows = [f"{x['budget']:8}{x['parallel']:10.3f}{x['sequential']:12.3f}" for x in lines]
    return "\n".join([f"{'budget':>8}{'parallel':>10}{'sequential':>12}", *rows])


# --- 2. Repair: wrong first attempts are given ---------------------------------------------------


def read_attempts(path: Path, problems: list[Problem]) -> tuple[list[Problem], list[str]]:
    """Problems and first attempts from a JSONL file.

    A row is a line of an evaluation's transcripts.jsonl, or it has task_id and program. Raises
    InputError for any other row, and for a row whose problem is not among `problems`.
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
                f"--repair {path}, row {number} lacks an attempt or a problem of this --split: "
                "give id and attempts, as in transcripts.jsonl, or task_id and program"
            )
        asked.append(problem)
        attempts.append(text)
    if not asked:
        raise InputError(f"--repair {path} holds no row: name another file")
    return asked, attempts


def given_episodes(
    problems: list[Problem], attempts: list[str], chat: Chat, longest: int
) -> list[Episode]:
    """Episodes of one task with these first attempts; those above `longest` tokens are skipped."""
    stated, rewards = judge(attempts, [None] * len(attempts), problems)
    episodes = []
    for problem, text, says, right in zip(problems, attempts, stated, rewards, strict=True):
        tokens = [*chat.tokenizer(text, add_special_tokens=False).input_ids, chat.close_id]
        attempt = Attempt(tokens, [0.0] * len(tokens), text, says, True, right)
        episodes.append(Episode(problem, chat.x1(problem), (attempt,)))
    kept = [e for e in episodes if len(e.attempts[0].tokens) <= longest]
    if len(kept) < len(episodes):
        skipped = len(episodes) - len(kept)
        print(f"skipped {skipped} attempts longer than --max-new-tokens", file=sys.stderr)
    return kept


def only_wrong(episodes: list[Episode], source: str) -> list[Episode]:
    """The episodes whose attempt 1 is wrong: the others need no repair."""
    found = [episode for episode in episodes if not episode.attempts[0].reward]
    print(f"{len(found)} of {len(episodes)} attempts of {source} are wrong, and will be corrected")
    if not found:
        raise InputError("--repair found no wrong attempt: name a FILE that holds some")
    return found


# --- 3. Main -------------------------------------------------------------------------------------

REMEDIES = {
    "unreadable": "see in transcripts.jsonl if attempts end in the form that the task reads",
    "cut_off": "raise --max-new-tokens",
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 130 Ctrl-C."""
    try:
        with ranks.process_group(), disk_errors_explained():
            args = ranks.on_all_ranks(parse_eval_flags, __doc__, argv)
            unused = ("problems", "rows") if args.ask else ()
            settings = {name: x for name, x in args.as_in_run.items() if name not in unused}
            if settings:
                print(f"asked as in the run:{as_words(settings)}", file=sys.stderr)
            if args.plot or args.report:
                if args.model:
                    raise InputError("--report and --plot evaluate no --model: leave it out")
                draw = (
                    partial(figures.draw, args.plot) if args.plot else partial(write_report, args)
                )
                print(f"wrote {ranks.on_all_ranks(draw)}")
                return 0
            ranks.on_all_ranks(check_flags, args)
            ranks.on_all_ranks(warn_of_changes, args)
            if args.ask is not None:
                answer_question(args)
            else:
                problems, folder, settings = ranks.on_all_ranks(prepare, args)
                with locked(folder):
                    run_evaluation(args, problems, folder, settings)
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    return 0


def warn_of_changes(args: Namespace) -> None:
    """Say which file or data set of the run, if the model is asked as there, has changed since."""
    record = read_json(Path(args.model).absolute().parent / "config.json")
    if not args.as_in_run or not of_this_version(record["settings"]):
        return
    unused = {name: "" for name in ("prompt", "correction", "data") if name not in args.as_in_run}
    cfg = Config(**record["settings"] | unused)
    for name in changed_inputs(cfg, record.get("inputs", {})):
        print(f"but --{name} {getattr(cfg, name)} has changed since the run", file=sys.stderr)


def write_report(args: Namespace) -> Path:
    """Write the page of --report into --out, or else into the first folder of --report."""
    return report.write(args.report, args.out or args.report[0])


def answer_question(args: Namespace) -> None:
    """Print the attempts at the question of --ask, which has no known answer."""
    model, chat = load_with_chat(args.model, args)
    problem = Problem(args.ask, answer=None, task=args.task, id=args.ask)
    attempts = 3 if args.refine else args.attempts
    sampling = Sampling(attempts, args.max_new_tokens, args.temperature, args.seed, args.rows)
    asked, _ = askable([problem], model, chat, sampling)
    [episode] = rollout(model, chat, asked, sampling)
    names = ["attempt 1", "feedback", "attempt 2"] if args.refine else None
    for number, attempt in enumerate(episode.attempts, start=1):
        cut = "" if attempt.finished else " (cut off: raise --max-new-tokens)"
        name = names[number - 1] if names else f"attempt {number}"
        read = "nothing" if attempt.stated is None else attempt.stated
        said = "" if "\n" in read else f"(read as the answer: {read})\n"  # else it is a program
        print(f"{name}{cut}\n{attempt.text}\n{said}")


def prepare(args: Namespace) -> tuple[list[Problem], Path, dict[str, str]]:
    """Problems, folder and settings of an evaluation; InputError if it cannot be written there."""
    data = {"data": args.data, "columns": args.columns}
    problems = load_problems(args.task, args.split, args.problems, **data)
    no_settings = ("out", "plot", "rows", "report", "ask", "as_in_run", "task_known")
    given = {key: value for key, value in vars(args).items() if key not in no_settings}
    settings = {key: str(value) for key, value in with_absolute_paths(given).items()}
    kinds = {
        args.split: args.split != "test",
        "repair": args.repair is not None,
        "samples": args.samples,
        "refine": args.refine,
    }
    model = Path(args.model) if Path(args.model).name.strip(".") else Path(args.model).resolve()
    of_run = (model.parent / "metrics.jsonl").exists()
    name = "-".join([model.name, *(kind for kind, asked in kinds.items() if asked)])
    folder = args.out or (model.parent if of_run else Path("runs")) / "eval" / name
    kept = "scaling.json" if args.samples else "metrics.json"
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*.json")):
        raise InputError(f"--out {folder} holds files, but no evaluation: name another folder")
    if (folder / "config.json").exists():
        raise InputError(f"--out {folder} holds a run or a checkpoint: name another folder")
    earlier = read_json(folder / kept).get("settings", settings)
    for key in (key for key in settings if earlier.get(key) != settings[key]):
        before, now = earlier.get(key) or "none", settings[key] or "none"
        words = f"with {as_flag(key)} {before}, not {now}"
        raise InputError(f"--out {folder} holds an evaluation {words}: name another folder")
    return problems, folder, settings


def check_flags(args: Namespace) -> None:
    """Raise InputError for a flag that cannot work."""
    if not args.model:
        raise InputError("--model is missing: name a checkpoint folder, or a run with --report")
    if not args.task_known:
        models.check_name(whole_of(args.model))
        raise InputError(f"--model {args.model} is in no run folder: name its --task")
    check_task(args.task, data=args.data, columns=args.columns)
    wording_of(args)
    if args.split not in find_task(args.task).splits:
        splits = " or ".join(find_task(args.task).splits)
        raise InputError(f"--split {args.split} is unknown to --task {args.task}: choose {splits}")
    check_precision(args.precision)
    for name in ("attempts", "problems", "max_new_tokens", "rows"):
        if getattr(args, name) < 1:
            raise InputError(f"{as_flag(name)} must be 1 or more")
    if args.temperature != 0 and not args.temperature >= COLDEST:
        raise InputError(
            f"--temperature {args.temperature} cannot be used: give 0, or {COLDEST} or more"
        )
    two_own_attempts = args.repair is None and args.attempts == 2
    if args.samples < 0 or (args.samples and not two_own_attempts):
        raise InputError(
            f"--samples {args.samples} cannot be used: give 1 or more, and leave out --attempts "
            "and --repair"
        )
    if args.refine and (args.samples or not two_own_attempts):
        raise InputError("--refine must be alone: leave out --attempts, --samples and --repair")
    if args.ask is not None and (not args.ask.strip() or args.samples or args.repair is not None):
        raise InputError(
            f"--ask {args.ask!r} cannot be used: give a question, and leave out --samples and "
            "--repair"
        )
    if args.repair is not None and args.attempts < 2:
        raise InputError(
            "--attempts 1 is too few for --repair, which gives attempt 1: give 2 or more"
        )


def load_with_chat(name: str, args: Namespace):
    """A model on this rank's device, and its Chat."""
    model, tokenizer = ranks.on_all_ranks(load_checkpoint, name, args.precision)
    read = refining if args.refine else read_chat
    chat = ranks.on_all_ranks(read, tokenizer, model, args.task, wording_of(args))
    model.to(ranks.device())
    ranks.on_all_ranks(check_sampling, model, 0)
    return model, chat


def base_attempts(args: Namespace, problems, sampling: Sampling) -> list[Episode]:
    """The wrong first attempts of the base model, decoded greedily."""
    base = base_of(args.model)
    model, chat = load_with_chat(base, args)
    one = replace(sampling, attempts=1, temperature=0.0)
    return ranks.on_all_ranks(only_wrong, evaluate(model, chat, problems, one)[0], base)


def file_attempts(args: Namespace, problems, chat: Chat) -> list[Episode]:
    """The wrong first attempts of a file; only rank 0 reads and judges them, for all ranks."""
    if ranks.rank():
        return []
    asked, attempts = read_attempts(Path(args.repair), problems)
    return only_wrong(given_episodes(asked, attempts, chat, args.max_new_tokens), args.repair)


def run_evaluation(args: Namespace, problems: list, folder: Path, settings: dict) -> None:
    """Evaluate a model, write the files, print every metric and its interval."""
    attempts = 3 if args.refine else args.attempts
    sampling = Sampling(attempts, args.max_new_tokens, args.temperature, args.seed, args.rows)
    begun = base_attempts(args, problems, sampling) if args.repair == "" else []
    model, chat = load_with_chat(args.model, args)
    if args.repair:
        begun = ranks.all_gather(ranks.on_all_ranks(file_attempts, args, problems, chat))
    if args.samples:
        lines = compare_votes(partial(evaluate, model, chat), problems, args.samples, sampling)
        record = {"settings": settings, "lines": lines}
        write_atomically(folder / "scaling.json", json.dumps(record, indent=2))
        print(f"{votes_table(lines)}\nwrote {folder}/scaling.json")
        return
    problems = [episode.problem for episode in begun] or problems
    episodes, metrics = evaluate(model, chat, problems, sampling, begun)
    said = [{}] * len(episodes)
    if args.refine:  # the second of three is the feedback, which is no attempt
        said = [{"feedback": episode.attempts[1].text} for episode in episodes]
        episodes = [replace(episode, attempts=episode.attempts[::2]) for episode in episodes]
        metrics = measure(episodes)
    groups = by_group(episodes)
    bounds = intervals(metrics, len(episodes))
    record = {"settings": settings, "metrics": metrics, "intervals": bounds, "groups": groups}
    write_atomically(folder / "transcripts.jsonl", "".join(map(transcript_line, episodes, said)))
    # written last: where it exists, the evaluation is complete
    write_atomically(folder / "metrics.json", json.dumps(record, indent=2))
    print(f"{'problems':14}{len(episodes):8}")
    for name, value in metrics.items():
        ends = (f"{end + 0.0:.3f}" for end in (round(x, 3) for x in bounds.get(name, ())))
        print(f"{name:14}{value:8.3f}" + (f"  [{', '.join(ends)}]" if name in bounds else ""))
    if groups and args.attempts > 1:
        print(as_table(groups))
    for name, remedy in REMEDIES.items():
        if metrics[name] > 0.1:
            print(f"{name} is above .1: {remedy}")
    print(f"wrote {folder}/metrics.json and transcripts.jsonl")


def transcript_line(episode: Episode, said: dict[str, str]) -> str:
    attempts = [vars(attempt) for attempt in episode.attempts]
    row = {**vars(episode.problem), "x1": episode.x1, "attempts": attempts, **said}
    return json.dumps(row) + "\n"


if __name__ == "__main__":
    ranks.run_command(main)
