"""What the paper compares (Tables 1, 2, 4, Figures 1, 3 to 5, 7, 8), in one command.

    python experiments/reproduce.py               the built-in task, five seeds
    python experiments/reproduce.py --seeds 1     one of them; the others can follow later
    python experiments/reproduce.py --model google/gemma-2-2b-it --task math --out runs/gemma

What is finished is kept, so that after any stop the same command goes on, run by run. All methods
have the same base model, episodes per update and, but for rounding up, updates. One thread a run
and one run a core (on GPUs one run at a time), so that the numbers do not depend on the number of
cores. Other flags than these are score.py's, for every run. Writes results.json, table.md and
pictures (pictures.py), which need requirements-dev.txt.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mpmath import betainc
from torch.distributed.run import get_args_parser
from tqdm import tqdm
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402
from config import Config, as_flag, check_settings, configure, parse_train_flags, plan_of, reject  # noqa: E402
from data import InputError  # noqa: E402
from experiments import pictures  # noqa: E402
from figures import canvas  # noqa: E402
from score import STAGES  # noqa: E402
from tasks import ATTEMPT_FLAGS  # noqa: E402

# --- 1. The grid ---------------------------------------------------------------------------------
# {base} and {stage1} are checkpoints of SCoRe's run of the same seed, {all} all of its updates.

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
        ("base", "star+", "pair", "direct", "score"),
        "metrics.json",
    ),
    "repair": ("--repair", ("star+", "pair", "pair+", "direct", "score"), "metrics.json"),
    "samples": ("--samples 16", ("score",), "scaling.json"),
}
ROWS = {  # of the table, by run; base and stage1 are of SCoRe's
    "base": "base model",
    "refine": "Self-Refine",
    "star": "STaR, D",
    "star+": "STaR, D+",
    "pair": "Pair-SFT, D",
    "pair+": "Pair-SFT, D+",
    "single": "single-turn RL (no multi-turn training)",
    "standard": "standard multi-turn RL (y2 alone)",
    "direct": "direct multi-turn RL (y1 and y2)",
    "stage1": "SCoRe after Stage I",
    "score": "**SCoRe**",
    "no-stage1": "SCoRe without Stage I",
    "no-bonus": "SCoRe without the bonus",
    "star-stage2": "SCoRe with STaR in Stage II",
    "offline": "SCoRe without online first attempts",
}
ASKING = 150  # tokens, about, of the words that ask for one more attempt
COLUMNS = {
    "acc_t1": "acc@t1",
    "acc_t2": "acc@t2",
    "delta": "delta",
    "delta_i_to_c": "i→c",
    "delta_c_to_i": "c→i",
    "copied": "copied",
}


@dataclass(frozen=True)
class Job:
    """A command of score.py or eval.py; it is done when `key` is in the JSON file it writes."""

    name: str
    folder: Path
    script: str
    flags: list[str]
    file: str
    key: str

    def done(self) -> bool:
        return self.key in runs.read_json(self.folder / self.file)


def model_of(folder: Path, name: str, model: str) -> str:
    """The checkpoint of a run of one seed, whose folder this is; "base" is the base model."""
    if name == "base":
        return runs.base_in(folder / "score", model)
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


def plan(out: Path, seeds: int, typed: dict, given: list[str], attempts: int) -> list[list[Job]]:
    """All jobs, in waves that need those before: SCoRe, what is compared with it, evaluations."""
    cfg = configure(typed)
    steps = cfg.steps1 + cfg.steps2
    waves = [[], [], []]
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        names = {
            "base": model_of(folder, "base", cfg.model),
            "stage1": folder / "score" / "stage1",
            "all": steps,
            "third": -(-steps // 3),
            "end": -(-cfg.steps2 // 3),
        }
        for name, (flags, last) in TRAINED.items():
            own = [word.format(**names) for word in flags.split()]
            model = [] if name == "score" else ["--model", names["base"]]
            words = [*given, "--seed", str(seed), *own, *model]
            job = Job(f"{name} {seed}", folder / name, "score.py", words, "results.json", last)
            waves[0 if name == "score" else 1].append(job)
        for kind, (flags, models, file) in EVALUATED.items():
            key = "lines" if file == "scaling.json" else "metrics"
            for name in models:
                where = folder / f"eval-{kind}-{name}"
                model = ["--model", model_of(folder, name, cfg.model), *of_eval(typed)]
                words = [*model, *flags.format(attempts=attempts).split()]
                waves[2].append(Job(f"{kind} {name} {seed}", where, "eval.py", words, file, key))
    return waves


def of_eval(typed: dict) -> list[str]:
    """Those of score.py's flags that eval.py has, too."""
    shared = ("task", "data", *ATTEMPT_FLAGS)
    return [x for name in shared if name in typed for x in (as_flag(name), str(typed[name]))]


# --- 2. Doing it ---------------------------------------------------------------------------------


@dataclass
class Running:
    """The commands that run, and whether no other may begin."""

    processes: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False

    def stop(self) -> None:
        """Tell all to save and end, once: a second signal would not let them save."""
        told, self.stopped = self.stopped, True
        for process in [] if told else list(self.processes):
            process.terminate()


def do(job: Job, launcher: list[str], running: Running) -> None:
    """Begin a job, or go on with it, unless it is done."""
    if running.stopped or job.done():
        return
    begun = job.script == "score.py" and (job.folder / "metrics.jsonl").exists()
    flags = ["--resume"] if begun else job.flags
    command = [*launcher, str(ROOT / job.script), "--out", str(job.folder), *flags]
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **threads}
    log = job.folder.with_name(job.folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        running.processes.append(process)
        if running.stopped:  # meanwhile
            process.terminate()
        status = process.wait()
        running.processes.remove(process)
    if not running.stopped and (status or not job.done()):
        running.stop()
        last = log.read_text().replace("\r", "\n").strip().splitlines()[-1]
        raise InputError(f"{job.name} ended with status {status}, see {log}: {last}")


def do_all(waves: list[list[Job]], jobs: int, launcher: list[str]) -> None:
    """Do each wave, `jobs` at a time; at an error or a signal, what runs is told to save."""
    running = Running()
    with tqdm(total=sum(map(len, waves)), desc="reproduce", unit="run") as bar:
        for wave in waves:
            with ThreadPoolExecutor(jobs) as pool:
                begun = [pool.submit(do, job, launcher, running) for job in wave]
                try:
                    for one in as_completed(begun):
                        one.result()
                        bar.update()
                except BaseException:
                    running.stop()
                    raise


def launch(gpus: int) -> list[str]:
    """What stands before a script: Python, or torchrun, which is to wait for a step to end."""
    if not gpus:
        return [sys.executable]
    patience = ["--shutdown_timeout=600"] * (
        "--shutdown_timeout" in get_args_parser().format_help()
    )
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", *patience]


# --- 3. The table --------------------------------------------------------------------------------


def collect(out: Path, seeds: int, settings: dict) -> dict:
    """results.json: metrics of every row by seed."""
    rows = {}
    for name in ROWS:
        file, key = f"{name}/results.json", TRAINED.get(name, ("", ""))[1]
        if name == "refine":
            file, key = "eval-refine-base/metrics.json", "metrics"
        elif name in ("base", "stage1"):
            file, key = "score/results.json", name
        found = [runs.read_json(out / f"seed-{seed}" / file)[key] for seed in range(seeds)]
        rows[name] = {column: [metrics[column] for metrics in found] for column in COLUMNS}
    return {"settings": settings, "seeds": seeds, "rows": rows}


def p_value(ours: list[float], theirs: list[float]) -> float | None:
    """Two-sided p of a paired t-test over seeds; None if there is too little to test.

    P(|T| >= t) = I_x(ν / 2, 1 / 2) with x = ν / (ν + t²) and ν = n - 1 degrees of freedom.
    """
    differences = [round(a - b, 9) for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    n, spread = len(differences), statistics.stdev(differences)
    t = statistics.mean(differences) / (spread / n**0.5)
    return float(betainc((n - 1) / 2, 0.5, 0, (n - 1) / (n - 1 + t * t), regularized=True))


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds, and SCoRe against each row, paired."""
    tested = {"acc_t2": "p of acc@t2", "delta": "p of delta"}
    heads = ["", *COLUMNS.values(), *tested.values()]
    lines = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads))]
    ours = results["rows"]["score"]
    for name, metrics in results["rows"].items():
        cells = [mean_and_spread(metrics[column]) for column in COLUMNS]
        for column in tested:
            p = None if name == "score" else p_value(ours[column], metrics[column])
            cells.append("" if p is None else "< .001" if p < 0.001 else short(p))
        lines.append(f"| {ROWS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float]) -> str:
    parts = [statistics.mean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
    return " ± ".join(map(short, parts))


def short(value: float) -> str:
    """Three decimals, without the zero before them, and without a sign if all are zero."""
    return f"{round(value, 3) + 0.0:.3f}".replace("0.", ".")


# --- 4. Main -------------------------------------------------------------------------------------


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, dict, list[str]]:
    """Flags of this script, and those for score.py, as values and as words."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    words = "GPUs of each run, by torchrun"
    parser.add_argument("--nproc-per-node", type=int, default=0, metavar="N", help=words)
    parser.error = reject
    args, given = parser.parse_known_args(argv)
    typed = parse_train_flags(__doc__, given)
    ours = {"stage", "out", "seed", "init", "alpha", "beta2", "adaptive_beta2", "offline"}
    ours |= {"attempts", "resume"}
    for name in sorted(ours & set(typed)):
        raise InputError(f"{as_flag(name)} is what the methods differ in: leave it out")
    if args.seeds < 1 or args.nproc_per_node < 0:
        raise InputError("--seeds must be 1 or more, and --nproc-per-node 0 or more")
    cfg = configure(typed)
    check_settings(cfg, plan_of(cfg.stage, STAGES))
    return args, typed, given


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 130 stopped."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        args, typed, given = parse_flags(argv)
        canvas(1, 1, (1, 1))  # is there something to draw with?
        with runs.locked(args.out):
            go(args, typed, given)
    except InputError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on, run by run", file=sys.stderr)
        return 130
    return 0


def go(args: argparse.Namespace, typed: dict, given: list[str]) -> None:
    """Do what is left to do, and write results.json, table.md and pictures."""
    kept = args.out / "settings.json"
    begun = kept.exists() and any(args.out.glob("seed-*/*/config.json"))
    settings = runs.read_json(kept) if begun else typed
    if settings != typed:
        words = " ".join(f"{as_flag(name)} {value}" for name, value in settings.items())
        raise InputError(f"--out {args.out} holds runs with {words or 'no flags'}: name another")
    waves = plan(args.out, args.seeds, typed, given, most_attempts(configure(typed)))
    runs.write_atomically(kept, json.dumps(typed))
    alone = torch.cuda.is_available() or args.nproc_per_node
    do_all(waves, 1 if alone else os.cpu_count() or 1, launch(args.nproc_per_node))
    results = collect(args.out, args.seeds, settings)
    runs.write_atomically(args.out / "results.json", json.dumps(results, indent=1))
    runs.write_atomically(args.out / "table.md", table(results))
    print(table(results), end="")
    for path in pictures.draw(args.out, args.seeds):
        print("wrote", path)


if __name__ == "__main__":
    sys.exit(main())
