"""What the paper compares (Tables 1, 2, 4, Figures 1, 3 to 5, 7, 8), in one command.

    python experiments/reproduce.py                 the built-in task, seeds 50 to 59
    python experiments/reproduce.py --seeds 50-52   some of them; the others can follow later
    python experiments/reproduce.py --only score --threads 2 --out runs/two-threads
    python experiments/reproduce.py --model google/gemma-2-2b-it --task math --out runs/gemma
    python experiments/reproduce.py --map           when does SCoRe pay? (landscape.py)

Finished runs are kept: after any stop, the same command goes on. All methods have the same base
model, as many episodes per update, and (but for rounding up) as many updates. Each run has one
thread, and each core one run (on GPUs, one run at a time), so that the numbers do not depend on the
number of cores. All other flags go to score.py, in every run. Results are results.json, tables
(tables.py) and pictures (pictures.py, which needs requirements-dev.txt).
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402
from config import (  # noqa: E402
    Config,
    as_flag,
    check_settings,
    configure,
    parse_train_flags,
    plan_of,
    raise_input_error,
)
from data import InputError, read_jsonl  # noqa: E402
from experiments import landscape, pictures  # noqa: E402
from experiments.jobs import Job, do_all, launch  # noqa: E402
from experiments.tables import COLUMNS, REWRITTEN, ROWS, claims, rewrites, summary, table  # noqa: E402
from figures import canvas  # noqa: E402
from score import STAGES  # noqa: E402
from tasks import ATTEMPT_FLAGS, find_task, keeps_answer  # noqa: E402

# --- 1. The grid ---------------------------------------------------------------------------------
# {base} and {stage1} are checkpoints of SCoRe's run of the same seed; {all} counts its updates.

TRAINED = {  # name of the run: flags, and the checkpoint they end with
    "score": ("--stage 1,2", "stage2"),
    "star": ("--stage star,star,star --steps2 {third}", "star-3"),
    "star+": ("--stage star+,star+,star+ --steps2 {third}", "star+-3"),
    "pair": ("--stage pair --steps2 {all}", "pair"),
    "pair+": ("--stage pair+ --steps2 {all}", "pair+"),
    "single": ("--stage 0 --steps1 {all}", "stage0"),
    "standard": ("--stage 1 --beta2 0 --steps1 {all}", "stage1"),
    "direct": ("--stage 2 --alpha 0 --init {base} --steps2 {all}", "stage2"),
    "no-stage1": ("--stage 2 --init {base} --steps2 {all}", "stage2"),
    "no-bonus": ("--stage 2 --alpha 0 --init {stage1}", "stage2"),
    "star-stage2": ("--stage star+,star+,star+ --init {stage1} --steps2 {end}", "star+-3"),
    "offline": ("--stage 1,2 --offline 1", "stage2"),
}
EVALUATED = {  # kind: flags of eval.py, the runs whose last checkpoint it is for, its file
    "refine": ("--refine", ("base",), "metrics.json"),
    "attempts": (
        "--attempts {attempts}",
        ("base", "stage1", "star+", "pair", "direct", "score"),
        "metrics.json",
    ),
    "repair": ("--repair", ("star+", "pair", "pair+", "direct", "score"), "metrics.json"),
    "samples": ("--samples 16 --problems 500", ("score",), "scaling.json"),
}
ASKING = 150  # about so many tokens ask for one more attempt


def model_of(folder: Path, name: str, model: str) -> str:
    """The checkpoint of a run of one seed, whose folder this is; or "base", or "stage1"."""
    if name == "base":
        return runs.base_of_run(folder / "score", model)
    if name == "stage1":
        return str(folder / "score" / "stage1")
    return str(folder / name / TRAINED[name][1])


def most_attempts(cfg: Config) -> int:
    """Ten, or as many as the base model has positions for beside a prompt of 1,024 tokens."""
    if cfg.model == "builtin":
        return 10
    try:
        config = AutoConfig.from_pretrained(cfg.model)
    except Exception as error:  # whatever a damaged folder or an absent network raises
        raise InputError(f"--model {cfg.model} cannot be loaded: name a checkpoint") from error
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    each = cfg.max_new_tokens + ASKING
    return min(10, max(2, (positions - 1024) // each))


def plan(
    out: Path, seeds: list[int], typed: dict, given: list[str], attempts: int, only=()
) -> list[list[Job]]:
    """All jobs in three waves, each of which needs those before: SCoRe, other methods, evaluations.

    only: the runs to make besides SCoRe; if it is empty, all runs and evaluations are made.
    """
    cfg = configure(typed)
    steps = cfg.steps1 + cfg.steps2
    waves = [[], [], []]
    for seed in seeds:
        folder = out / f"seed-{seed}"
        names = {
            "base": model_of(folder, "base", cfg.model),
            "stage1": model_of(folder, "stage1", cfg.model),
            "all": steps,
            "third": -(-steps // 3),
            "end": -(-cfg.steps2 // 3),
        }
        for name, (flags, last) in TRAINED.items():
            own = [word.format(**names) for word in flags.split()]
            model = [] if name == "score" else ["--model", names["base"]]
            words = [*given, "--seed", str(seed), *own, *model]
            if only and name not in ("score", *only):
                continue
            job = Job(f"{name} {seed}", folder / name, "score.py", words, "results.json", last)
            waves[0 if name == "score" else 1].append(job)
        for kind, (flags, models, file) in ({} if only else EVALUATED).items():
            key = "lines" if file == "scaling.json" else "metrics"
            for name in models:
                where = folder / f"eval-{kind}-{name}"
                own = flags.format(attempts=attempts).split()
                words = ["--model", model_of(folder, name, cfg.model), *own, *of_eval(typed)]
                waves[2].append(Job(f"{kind} {name} {seed}", where, "eval.py", words, file, key))
    return waves


def of_eval(typed: dict) -> list[str]:
    """The task, and the typed flags that score.py and eval.py share."""
    shared, typed = ("task", "data", *ATTEMPT_FLAGS), {"task": Config.task, **typed}
    return [x for name in shared if name in typed for x in (as_flag(name), str(typed[name]))]


# --- 2. The results ------------------------------------------------------------------------------


def collect(out: Path, seeds: list[int], settings: dict) -> dict:
    """What results.json holds: metrics by seed of every row whose runs are done."""
    folders, rows = [out / f"seed-{seed}" for seed in seeds], {}
    for name in ROWS:
        file, key = f"{name}/results.json", TRAINED.get(name, ("", ""))[1]
        if name == "refine":
            file, key = "eval-refine-base/metrics.json", "metrics"
        elif name in ("base", "stage1"):
            file, key = "score/results.json", name
        found = [runs.read_json(folder / file).get(key) for folder in folders]
        if None not in found:
            rows[name] = {column: [metrics[column] for metrics in found] for column in COLUMNS}
    for name in EVALUATED["repair"][1]:  # shares of wrong first attempts that are corrected
        if name in rows and (folders[0] / f"eval-repair-{name}").exists():
            rows[name]["given"] = [pictures.given(folder, name) for folder in folders]
            rows[name]["own"] = [pictures.own(folder, name) for folder in folders]
    for name in EVALUATED["attempts"][1]:
        if name in rows and (folders[0] / f"eval-attempts-{name}").exists():
            shares = zip(*(rewritten(folder, name) for folder in folders), strict=True)
            rows[name] |= dict(zip(REWRITTEN, map(list, shares), strict=True))
    lines = [runs.read_log(folder / "score" / "metrics.jsonl") for folder in folders]
    ends = {name: [last_fifth(one, name) for one in lines] for name in ("acc_t1", "acc_t2")}
    return {"settings": settings, "seeds": seeds, "rows": rows, "moved at the end": ends}


def rewritten(folder: Path, name: str) -> tuple[float, float]:
    """Shares of right and of wrong first attempts after which attempt 2 does not keep the answer.

    A rewrite may state the same answer. Where a task has no word for keeping, all are rewrites.
    """
    rows = read_jsonl(folder / f"eval-attempts-{name}" / "transcripts.jsonl")
    task, rewrites = find_task(rows[0]["task"]), {1: [], 0: []}  # by the reward of attempt 1
    for first, second, *_ in (row["attempts"] for row in rows):
        rewrites[int(first["reward"])].append(not keeps_answer(second["text"], task))
    right, wrong = (sum(of_kind) / max(1, len(of_kind)) for of_kind in rewrites.values())
    return right, wrong


def last_fifth(lines: list[dict], name: str) -> float:
    """How far a sampled accuracy moves between the last two fifths of the last stage."""
    values = [line[name] for line in lines if line["stage"] == lines[-1]["stage"]]
    size = max(1, len(values) // 5)
    return statistics.mean(values[-size:]) - statistics.mean(values[-2 * size : -size] or values)


# --- 3. Main -------------------------------------------------------------------------------------


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, dict, list[str]]:
    """Flags of this script, and those for score.py, as values and as words."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", help="such as 3,5 or 50-59 (the default; with --map 30-32)")
    parser.add_argument("--out", type=Path, help="default: runs/reproduce, or runs/map")
    parser.add_argument(
        "--only", default="", help=f"some of {', '.join(TRAINED)}; SCoRe always runs"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--map", action="store_true", help="SCoRe minus direct RL, by base model")
    words = "GPUs of each run, by torchrun"
    parser.add_argument("--nproc-per-node", type=int, default=0, metavar="N", help=words)
    parser.error = raise_input_error
    args, given = parser.parse_known_args(argv)
    typed = parse_train_flags(__doc__, given)
    ours = {"stage", "out", "seed", "init", "alpha", "beta2", "adaptive_beta2", "offline"}
    ours |= {"attempts", "resume"}
    for name in sorted(ours & set(typed)):
        raise InputError(f"{as_flag(name)} is what the methods differ in: leave it out")
    args.seeds = read_seeds(args.seeds or ("30-32" if args.map else "50-59"))
    args.out = args.out or Path("runs/map" if args.map else "runs/reproduce")
    args.only = tuple(args.only.split(",")) if args.only else ()
    for name in args.only:
        if name not in TRAINED:
            raise InputError(f"--only {name} is unknown: choose some of {', '.join(TRAINED)}")
    if args.map and (args.only or typed.keys() & {"model", "task"}):
        raise InputError("--map is for the built-in task: leave out --model, --task and --only")
    if args.threads < 1 or args.nproc_per_node < 0:
        raise InputError("--threads must be 1 or more, and --nproc-per-node 0 or more")
    cfg = configure(typed)
    check_settings(cfg, plan_of(cfg.stage, STAGES))
    return args, typed, given


def read_seeds(text: str) -> list[int]:
    """The seeds of "10-12,3": 10, 11, 12 and 3."""
    seeds = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"--seeds {text} cannot be read: give some such as 50-59 or 3,5")
        seeds += range(first, last + 1)
    return seeds


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 130 stopped."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        args, typed, given = parse_flags(argv)
        canvas(1, 1, (1, 1))  # fails at once without matplotlib
        with runs.locked(args.out):
            go(args, typed, given)
    except InputError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def go(args: argparse.Namespace, typed: dict, given: list[str]) -> None:
    """Make the runs that are not done yet, and write results, tables and pictures."""
    kept = args.out / "settings.json"
    begun = kept.exists() and any(args.out.rglob("score/config.json"))
    wanted = typed | ({} if args.threads == 1 else {"threads": args.threads})
    settings = runs.read_json(kept) if begun else wanted
    if settings != wanted:
        words = " ".join(f"{as_flag(name)} {value}" for name, value in settings.items())
        raise InputError(f"--out {args.out} holds runs with {words or 'no flags'}: name another")
    if args.map:
        waves = landscape.plan(args.out, args.seeds, typed, given)
    else:
        attempts = most_attempts(configure(typed))
        waves = plan(args.out, args.seeds, typed, given, attempts, args.only)
    runs.write_atomically(kept, json.dumps(wanted))
    alone = torch.cuda.is_available() or args.nproc_per_node
    at_once = 1 if alone else max(1, (os.cpu_count() or 1) // args.threads)
    do_all(waves, at_once, launch(args.nproc_per_node), args.threads)
    if args.map:
        results = landscape.collect(args.out, args.seeds, settings)
        tables = {"table.md": landscape.table(results)}
    else:
        results = collect(args.out, args.seeds, settings)
        tables = {"table.md": table(results)}
        if not args.only:
            tables |= {"summary.md": summary(results), "claims.md": claims(results)}
            tables["rewrites.md"] = rewrites(results)
    runs.write_atomically(args.out / "results.json", json.dumps(results, indent=1))
    for name, text in tables.items():
        runs.write_atomically(args.out / name, text)
        print(text)
    if args.map:
        paths = [landscape.draw(args.out, results)]
    else:
        paths = [] if args.only else pictures.draw(args.out, args.seeds)
    for path in paths:
        print("wrote", path)


if __name__ == "__main__":
    sys.exit(main())
