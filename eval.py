"""How good is it? A model attempts held-out problems, and its attempts are measured.

    python eval.py --model runs/sums/stage2                 greedy, two attempts, 2,000 problems
    python eval.py --model runs/sums/stage2 --attempts 4    more attempts than in training
    python eval.py --model runs/math/stage2 --task math     MATH500, by level and by subject too
    python eval.py --model runs/code/stage2 --task code     HumanEval; MBPP with --split mbpp
    python eval.py --model runs/code/stage2 --task code --split mbpp --repair      (repair.py)
    python eval.py --model runs/sums/stage2 --samples 16    to sample or to correct (scaling.py)
    python eval.py --model runs/sums/base --refine          Self-Refine: prompts alone
    python eval.py --plot runs/sums                         its learning curve (figures.py)

Next to read: sft.py.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import figures
import ranks
import scaling
from data import InputError, Problem
from metrics import as_table, by_group, intervals, measure
from models import check_precision, load_checkpoint
from repair import base_of, begin, read_attempts, wrong
from runs import (
    COLDEST,
    alone_in,
    as_flag,
    read_json,
    reject,
    write_atomically,
)
from sample import Episode, Sampling, askable, rollout
from tasks import (
    OF_ATTEMPTS,
    TASKS,
    Chat,
    check_task,
    load_problems,
    read_chat,
    refining,
)

# --- 1. Attempts at held-out problems ---------------------------------------------------------


def evaluate(model, chat: Chat, problems: list[Problem], sampling: Sampling, begun=()):
    """Episodes and metrics of a model over `problems`; each rank attempts its share of them.

    begun: an episode for each problem, whose attempts are given and continued.
    """
    problems = ranks.together(askable, problems, model, chat, sampling)
    asked = {problem.id for problem in problems}
    begun = [episode for episode in begun if episode.problem.id in asked]
    share, episodes = ranks.share(len(problems)), []
    starts = range(share.start, share.stop, sampling.rows)
    for start in tqdm(starts, desc="eval", unit="batch", leave=False):
        part = slice(start, min(start + sampling.rows, share.stop))
        episodes += rollout(model, chat, problems, sampling, begun, part)
    episodes = ranks.gather(episodes)
    return episodes, measure(episodes)


# --- 2. Main -----------------------------------------------------------------------------------


def as_text(episode: Episode) -> str:
    """An episode as lines to read."""
    lines = [f"  problem    {episode.problem.question}   (answer: {episode.problem.answer})"]
    for number, attempt in enumerate(episode.attempts, start=1):
        verdict = "right" if attempt.reward else "wrong"
        lines.append(f"  attempt {number}  {attempt.text}   {verdict}")
    return "\n".join(lines) + "\n\n"


def transcript_line(episode: Episode, said: dict[str, str]) -> str:
    attempts = [vars(attempt) for attempt in episode.attempts]
    row = {**vars(episode.problem), "x1": episode.x1, "attempts": attempts, **said}
    return json.dumps(row) + "\n"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder, or name on the Hugging Face hub")
    parser.add_argument("--task", default="sums", help=" or ".join(TASKS))
    parser.add_argument("--data", default="", help="folder of the task's JSONL files, not the hub")
    parser.add_argument("--split", default="test", help="of the problems; code: test or mbpp")
    words = "correct given wrong first attempts: of a JSONL file, or (without FILE) of the base"
    parser.add_argument("--repair", nargs="?", const="", metavar="FILE", help=words)
    words = f"votes of 2, 4 .. 2 SAMPLES, at temperature {scaling.TEMPERATURE} unless that is given"
    parser.add_argument("--samples", type=int, default=0, help=words)
    words = "Self-Refine: ask for feedback on attempt 1, and then for attempt 2"
    parser.add_argument("--refine", action="store_true", help=words)
    parser.add_argument("--attempts", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    for name, words in OF_ATTEMPTS.items():
        usual = ", ".join(f"{task}: {getattr(TASKS[task], name)}" for task in TASKS)
        parser.add_argument(
            as_flag(name), type=type(getattr(TASKS["sums"], name)), help=f"{words} ({usual})"
        )
    parser.add_argument("--seed", default="eval", help="of sampling, at a temperature above 0")
    parser.add_argument("--out", type=Path, help="folder to write to (default: MODEL/eval)")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a run or an evaluation")
    parser.error = reject
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    try:
        with ranks.joined():
            args = ranks.together(parse_flags, argv)
            if args.plot:
                print(f"wrote {figures.draw(args.plot)}")
            else:
                problems, folder, settings = ranks.together(prepare, args)
                with alone_in(folder):
                    report(args, problems, folder, settings)
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    return 0


def prepare(args: argparse.Namespace) -> tuple[list[Problem], Path, dict[str, str]]:
    """Problems, folder and settings of an evaluation; InputError for what cannot work."""
    check_task(args.task, data=args.data)
    if args.split not in TASKS[args.task].splits:
        splits = " or ".join(TASKS[args.task].splits)
        raise InputError(f"--split {args.split} is not one of --task {args.task}: {splits}")
    for name in OF_ATTEMPTS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(TASKS[args.task], name))
    check_precision(args.precision)
    for name in ("attempts", "problems", "max_new_tokens", "rows"):
        if getattr(args, name) < 1:
            raise InputError(f"{as_flag(name)} must be 1 or more")
    if not args.model:
        raise InputError("--model is missing: name a checkpoint folder, or --plot a run folder")
    if args.temperature != 0 and not args.temperature >= COLDEST:
        raise InputError(
            f"--temperature {args.temperature} must be 0 (greedy) or {COLDEST} or more"
        )
    if args.samples < 0 or (args.samples and (args.repair is not None or args.attempts != 2)):
        raise InputError(
            "--samples must be 1 or more, and goes with neither --attempts nor --repair"
        )
    if args.refine and (args.samples or args.repair is not None or args.attempts != 2):
        raise InputError("--refine goes with neither --attempts nor --samples nor --repair")
    if args.samples and args.temperature == 0:
        args.temperature = scaling.TEMPERATURE
    if args.repair is not None and args.attempts < 2:
        raise InputError("--repair needs --attempts 2 or more: the first are given")
    problems = load_problems(args.task, args.split, args.problems, args.data)
    no_settings = ("out", "plot", "rows")
    settings = {key: str(value) for key, value in vars(args).items() if key not in no_settings}
    local = Path(args.model).is_dir()
    name = "eval" + f"-{args.split}" * (args.split != "test")
    name += "-repair" * (args.repair is not None) + "-samples" * bool(args.samples)
    name += "-refine" * args.refine
    folder = args.out or (Path(args.model) if local else Path("runs") / args.model) / name
    kept = "scaling.json" if args.samples else "metrics.json"
    if read_json(folder / kept).get("settings", settings) != settings:
        raise InputError(f"{folder} holds another evaluation: name another folder with --out")
    return problems, folder, settings


def load(name: str, args: argparse.Namespace):
    """A model on this rank's device, and its Chat."""
    model, tokenizer = ranks.together(load_checkpoint, name, args.precision)
    read = refining if args.refine else read_chat
    return model.to(ranks.device()), ranks.together(read, tokenizer, model, args.task)


def base_attempts(args: argparse.Namespace, problems, sampling: Sampling) -> list[Episode]:
    """Wrong greedy first attempts of the base model."""
    base = base_of(args.model)
    model, chat = load(base, args)
    one = replace(sampling, attempts=1, temperature=0.0)
    return ranks.together(wrong, evaluate(model, chat, problems, one)[0], base)


def file_attempts(args: argparse.Namespace, problems, chat: Chat) -> list[Episode]:
    """Wrong first attempts of a file; one rank decides for all which are."""
    if ranks.rank():
        return []
    asked, attempts = read_attempts(Path(args.repair), problems)
    return wrong(begin(asked, attempts, chat, args.max_new_tokens), args.repair)


def report(args: argparse.Namespace, problems: list[Problem], folder: Path, settings) -> None:
    """Evaluate a model, print every metric and its interval, write both files."""
    attempts = 3 if args.refine else args.attempts
    sampling = Sampling(attempts, args.max_new_tokens, args.temperature, args.seed, args.rows)
    begun = base_attempts(args, problems, sampling) if args.repair == "" else []
    model, chat = load(args.model, args)
    if args.repair:
        begun = ranks.gather(ranks.together(file_attempts, args, problems, chat))
    if args.samples:
        votes = scaling.compare(
            lambda *asked: evaluate(model, chat, *asked)[0], problems, args.samples, sampling
        )
        record = {"settings": settings, "lines": votes}
        write_atomically(folder / "scaling.json", json.dumps(record, indent=2))
        print(f"{scaling.as_votes(votes)}\nwrote {folder}/scaling.json")
        return
    problems = [episode.problem for episode in begun] or problems
    episodes, metrics = evaluate(model, chat, problems, sampling, begun)
    said = [{}] * len(episodes)
    if args.refine:  # between two attempts came feedback, which is none
        said = [{"feedback": episode.attempts[1].text} for episode in episodes]
        episodes = [replace(episode, attempts=episode.attempts[::2]) for episode in episodes]
        metrics = measure(episodes)
    groups = by_group(episodes)
    bounds = intervals(metrics, len(episodes))
    for name, value in metrics.items():
        low_high = "[{:.3f}, {:.3f}]".format(*bounds[name]) if name in bounds else ""
        print(f"{name:14}{value:8.3f}  {low_high}")
    if groups and args.attempts > 1:
        print(as_table(groups))
    record = {"settings": settings, "metrics": metrics, "intervals": bounds, "groups": groups}
    write_atomically(folder / "transcripts.jsonl", "".join(map(transcript_line, episodes, said)))
    write_atomically(
        folder / "metrics.json", json.dumps(record, indent=2)
    )  # last: it says that all is done
    print(f"wrote {folder}/metrics.json and transcripts.jsonl")


if __name__ == "__main__":
    ranks.leave(main())
