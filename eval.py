"""How good is it? A model attempts held-out problems, and its attempts are measured.

    python eval.py --model runs/sums/stage2                 greedy, two attempts, 2,000 problems
    python eval.py --model runs/sums/stage2 --attempts 4    more attempts than in training
    python eval.py --model runs/math/stage2 --task math     MATH500, by level and by subject too
    python eval.py --model runs/code/stage2 --task code     HumanEval; MBPP with --split mbpp
    python eval.py --model runs/code/stage2 --task code --split mbpp --repair      (repair.py)
    python eval.py --plot runs/sums                         the learning curve, as a PNG

The metrics are those of section 3 of the paper. delta_i_to_c and delta_c_to_i are fractions of ALL
problems, so that acc_t2 - acc_t1 = delta_i_to_c - delta_c_to_i. Next to read: sft.py.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import ranks
from data import InputError, Problem
from models import check_precision, load_checkpoint
from repair import base_of, begin, read_attempts, wrong
from runs import (
    COLDEST,
    alone_in,
    as_flag,
    plot_run,
    read_json,
    reject,
    write_atomically,
)
from sample import Episode, Sampling, askable, rollout
from tasks import (
    OF_ATTEMPTS,
    TASKS,
    Chat,
    agree,
    check_task,
    load_problems,
    read_chat,
    stated_answer,
)

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution

# --- 1. Metrics (section 3 of the paper) -----------------------------------------------------


def measure(episodes: list[Episode]) -> dict[str, float]:
    """Every metric of the README's table, over all episodes; shares and accuracies in [0, 1]."""
    n, attempts = len(episodes), list(zip(*(e.attempts for e in episodes), strict=True))
    right = [[attempt.reward == 1.0 for attempt in column] for column in attempts]
    metrics = {f"acc_t{i}": sum(column) / n for i, column in enumerate(right, start=1)}
    if len(right) > 1:
        gained = sum(after > before for before, after in zip(*right[:2], strict=True)) / n
        lost = sum(after < before for before, after in zip(*right[:2], strict=True)) / n
        pairs = [e.attempts[:2] for e in episodes]
        metrics |= {"delta": metrics["acc_t2"] - metrics["acc_t1"]}
        metrics |= {"delta_i_to_c": gained, "delta_c_to_i": lost}
        metrics["copied"] = sum(same_statement(e) for e in episodes) / n
        metrics["edit_ratio"] = sum(edit_ratio(y1.tokens, y2.tokens) for y1, y2 in pairs) / n
    everything = [attempt for column in attempts for attempt in column]
    metrics["cut_off"] = sum(not attempt.finished for attempt in everything) / len(everything)
    answers = [stated_answer(y.text, e.problem.task) for e in episodes for y in e.attempts]
    metrics["unreadable"] = answers.count(None) / len(answers)
    for i, column in enumerate(attempts, start=1):
        metrics[f"length_t{i}"] = sum(len(attempt.tokens) for attempt in column) / n
    return metrics


def same_statement(episode: Episode) -> bool:
    """Does attempt 2 state the answer of attempt 1? Where none is readable, the texts decide."""
    one, two = (y.text for y in episode.attempts[:2])
    return one == two or agree(one, two, episode.problem.task)


def edit_ratio(one: list[int], two: list[int]) -> float:
    """Edit distance over the total length of both attempts, in tokens (Figure 3); in [0, 1].

    Levenshtein distance by Hyyrö's bit-parallel recurrence: bit i of `rise` (`fall`) says that the
    distance grows (shrinks) by one from row i to i + 1 of the current column.
    """
    full, top = (1 << len(one)) - 1, 1 << max(len(one) - 1, 0)
    where: dict[int, int] = {}
    for i, token in enumerate(one):
        where[token] = where.get(token, 0) | 1 << i
    rise, fall, distance = full, 0, len(one)
    for token in two:
        match = where.get(token, 0)
        diagonal = (((match & rise) + rise) ^ rise) | match | fall
        right_rise, right_fall = fall | (full & ~(diagonal | rise)), rise & diagonal
        distance += bool(right_rise & top) - bool(right_fall & top)
        right_rise = (right_rise << 1) | 1
        rise = ((right_fall << 1) | ~(diagonal | right_rise)) & full
        fall = right_rise & diagonal & full
    distance = distance if one else len(two)
    return distance / max(len(one) + len(two), 1)


def intervals(metrics: dict[str, float], n: int) -> dict[str, tuple[float, float]]:
    """95 % intervals: Wilson's for shares, Agresti and Min's for delta (paired: same problems)."""
    shares = [name for name in metrics if name.startswith(("acc_", "delta_", "copied"))]
    result = {name: wilson(metrics[name], n) for name in shares}
    if "delta" in metrics:
        gained, lost = metrics["delta_i_to_c"] * n + 0.5, metrics["delta_c_to_i"] * n + 0.5
        middle = (gained - lost) / (n + 2)
        spread = Z95 * ((gained + lost - (gained - lost) ** 2 / (n + 2)) ** 0.5) / (n + 2)
        result["delta"] = (middle - spread, middle + spread)
    return result


def wilson(share: float, n: int) -> tuple[float, float]:
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    spread = Z95 * (share * (1 - share) / n + Z95**2 / (4 * n**2)) ** 0.5 / (1 + Z95**2 / n)
    return min(middle - spread, share), max(middle + spread, share)  # against rounding at 0 and 1


def by_group(episodes: list[Episode]) -> dict[str, dict[str, float]]:
    """`measure` of each level and each subject, where the problems have them."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        level, subject = episode.problem.level, episode.problem.subject
        for name in (f"level {level}" if level else "", subject):
            groups.setdefault(name, []).append(episode)
    return {
        f"{name} ({len(groups[name])})": measure(groups[name]) for name in sorted(groups) if name
    }


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


def transcript_line(episode: Episode) -> str:
    attempts = [vars(attempt) for attempt in episode.attempts]
    return json.dumps({**vars(episode.problem), "x1": episode.x1, "attempts": attempts}) + "\n"


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """The five metrics of the paper and the share of copied answers, a line a model."""
    names = ["acc_t1", "acc_t2", "delta", "delta_i_to_c", "delta_c_to_i", "copied"]
    heads = ["acc@t1", "acc@t2", "delta", "i->c", "c->i", "copied"]
    width = max(16, *(len(row) + 1 for row in rows))
    lines = [" " * width + "".join(f"{head:>8}" for head in heads)]
    for row, metrics in rows.items():
        lines.append(f"{row:{width}}" + "".join(f"{metrics[name]:8.3f}" for name in names))
    return "\n".join(lines)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder, or name on the Hugging Face hub")
    parser.add_argument("--task", default="sums", help=" or ".join(TASKS))
    parser.add_argument("--data", default="", help="folder of the task's JSONL files, not the hub")
    parser.add_argument("--split", default="test", help="of the problems; code: test or mbpp")
    words = "correct given wrong first attempts: of a JSONL file, or (without FILE) of the base"
    parser.add_argument("--repair", nargs="?", const="", metavar="FILE", help=words)
    parser.add_argument("--attempts", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    for name, words in OF_ATTEMPTS.items():
        usual = ", ".join(f"{task}: {getattr(TASKS[task], name)}" for task in TASKS)
        parser.add_argument(
            as_flag(name), type=type(getattr(TASKS["sums"], name)), help=f"{words} ({usual})"
        )
    parser.add_argument("--seed", default="eval", help="of sampling, at a temperature above 0")
    parser.add_argument("--out", type=Path, help="folder to write to (default: MODEL/eval)")
    parser.add_argument("--plot", type=Path, metavar="RUN", help="draw a run's learning curve")
    parser.error = reject
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    try:
        with ranks.joined():
            args = ranks.together(parse_flags, argv)
            if args.plot:
                print(f"wrote {plot_run(args.plot)}")
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
    if args.repair is not None and args.attempts < 2:
        raise InputError("--repair needs --attempts 2 or more: the first are given")
    problems = load_problems(args.task, args.split, args.problems, args.data)
    no_settings = ("out", "plot", "rows")
    settings = {key: str(value) for key, value in vars(args).items() if key not in no_settings}
    local = Path(args.model).is_dir()
    name = (
        "eval" + f"-{args.split}" * (args.split != "test") + "-repair" * (args.repair is not None)
    )
    folder = args.out or (Path(args.model) if local else Path("runs") / args.model) / name
    if read_json(folder / "metrics.json").get("settings", settings) != settings:
        raise InputError(f"{folder} holds another evaluation: name another folder with --out")
    return problems, folder, settings


def load(name: str, args: argparse.Namespace):
    """A model on this rank's device, and its Chat."""
    model, tokenizer = ranks.together(load_checkpoint, name, args.precision)
    return model.to(ranks.device()), ranks.together(read_chat, tokenizer, model, args.task)


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
    sampling = Sampling(args.attempts, args.max_new_tokens, args.temperature, args.seed, args.rows)
    begun = base_attempts(args, problems, sampling) if args.repair == "" else []
    model, chat = load(args.model, args)
    if args.repair:
        begun = ranks.gather(ranks.together(file_attempts, args, problems, chat))
    problems = [episode.problem for episode in begun] or problems
    episodes, metrics = evaluate(model, chat, problems, sampling, begun)
    groups = by_group(episodes)
    bounds = intervals(metrics, len(episodes))
    for name, value in metrics.items():
        low_high = "[{:.3f}, {:.3f}]".format(*bounds[name]) if name in bounds else ""
        print(f"{name:14}{value:8.3f}  {low_high}")
    if groups and args.attempts > 1:
        print(as_table(groups))
    record = {"settings": settings, "metrics": metrics, "intervals": bounds, "groups": groups}
    write_atomically(folder / "metrics.json", json.dumps(record, indent=2))
    write_atomically(folder / "transcripts.jsonl", "".join(map(transcript_line, episodes)))
    print(f"wrote {folder}/metrics.json and transcripts.jsonl")


if __name__ == "__main__":
    ranks.leave(main())
