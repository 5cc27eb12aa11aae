"""What is kept: checkpoints, the run folder, and the state to resume from.

    runs/sums/  config.json     settings, versions, git commit
                metrics.jsonl   one line a step
                samples.txt     transcripts to read
                results.json    metrics of base and stages on held-out problems
                base/  stage1/  stage2/     save_pretrained folders with their tokenizer
                state/          weights, Adam and progress, for --resume
                curve.png       drawn by `python eval.py --plot` (figures.py)

What a run needs is written beside its place and then moved there: a kill never leaves half of it.
The two logs grow by a line per step; state/ remembers how long they were, and --resume cuts them
back to that. Of many processes the first writes text, and all of them write state/.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import ranks
from baselines import SFT
from data import InputError
from models import check_precision, move_in
from tasks import TASKS, check_task, load_problems, settings_of

LOGS, RESULTS = ("metrics.jsonl", "samples.txt"), "results.json"
BEGUN = {"base", RESULTS, "state"}  # what is written before config.json


@dataclass
class Run:
    """A run folder, the lines of its metrics.jsonl, and its results.json by model."""

    folder: Path
    lines: list[dict] = field(default_factory=list)
    results: dict[str, dict] = field(default_factory=dict)
    signal: int = 0  # that came: save and leave after this step

    def log(self, line: dict, samples: str = "") -> None:
        """Append one step to metrics.jsonl, and text to samples.txt."""
        self.lines.append(line)
        if ranks.rank():
            return
        for name, text in zip(LOGS, (json.dumps(line) + "\n", samples), strict=True):
            with (self.folder / name).open("a") as file:
                file.write(text)

    def write_results(self, name: str, metrics: dict) -> None:
        self.results[name] = metrics
        write_atomically(self.folder / RESULTS, json.dumps(self.results, indent=2))

    def stop_on_signals(self) -> None:
        """Ctrl-C and SIGTERM let the step end, save and leave; a second one leaves at once.

        torchrun sends them on, sometimes twice, and has its own --shutdown_timeout.
        """

        def stop(number, _frame):
            self.signal = number
            if ranks.launcher() == "python":
                signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


@dataclass
class Progress:
    """Where a run stands. Random numbers come from (seed, step), so they need no state."""

    index: int = 0  # of the stage in cfg.stage
    step: int = 0  # updates done in that stage
    best: float = -1.0  # reward of the checkpoint kept, over the steps between two saves
    raised: list[str] = field(default_factory=list)  # alarms
    beta2: float = 0.0  # of the next step


def plan_of(stage: str) -> list[tuple[str, str]]:
    """Stages and the names of their folders: "1,2,1" -> (1, stage1), (2, stage2), (1, stage1-2)."""
    stages = [part.strip() for part in stage.split(",")]
    if not set(stages) <= {"0", "1", "1b", "2", *SFT}:
        raise InputError(
            f"--stage {stage} is unknown: name stages such as 1 or 1,2, or with three attempts "
            f"1,1b,2; to compare with, 0 (single-turn RL) or {', '.join(SFT)}"
        )
    plan = []
    for number, name in enumerate(stages):
        before = stages[:number].count(name)
        folder = (name if name in SFT else f"stage{name}") + f"-{before + 1}" * bool(before)
        plan.append((name, folder))
    return plan


COLDEST = 0.01  # temperature: what is divided by less may not be finite

# --- 1. Text files ---------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing; of many processes the first does."""
    if ranks.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; InputError if it is damaged."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged and kept as it is: restore it") from error


def read_metrics(path: Path, size: int | None = None) -> list[dict]:
    """The lines of a metrics.jsonl, or of its first `size` bytes; a damaged line is named."""
    if not path.exists():
        raise InputError(f"{path} is missing: name a run folder of score.py")
    lines = []
    for number, line in enumerate(path.read_bytes()[:size].splitlines(), start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged in line {number}, and kept: restore it") from error
    return lines


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def reject(message: str) -> None:
    """argparse's errors as one sentence."""
    raise InputError(message)


def parse_flags(settings: type, words: str, argv: list[str] | None) -> dict:
    """The flags that were given, by name; defaults are left to the dataclass of settings."""
    parser = argparse.ArgumentParser(description=words.partition("\n")[0], allow_abbrev=False)
    parser.error = reject
    for item in fields(settings):
        others = {task: settings_of(task).get(item.name, item.default) for task in TASKS}
        of_task = "".join(f", {task}: {x}" for task, x in others.items() if x != item.default)
        default = "none" if item.default == "" else item.default
        text = f"{item.metadata['help']} (default: {default}{of_task})".replace("%", "%%")
        kind = {"action": "store_true"} if item.default is False else {"type": type(item.default)}
        parser.add_argument(as_flag(item.name), default=argparse.SUPPRESS, help=text, **kind)
    return vars(parser.parse_args(argv))


def command(cfg, flags: str) -> str:
    """The command that goes on with a run."""
    return f"{ranks.launcher()} score.py {flags}" + f" --out {cfg.out}" * (cfg.out != type(cfg).out)


def evaluating(cfg) -> str:
    """The command that evaluates a finished run."""
    task = "" if cfg.task == "sums" else f" --task {cfg.task}"
    task += f" --data {cfg.data}" if cfg.data else ""
    task += f" --attempts {cfg.attempts}" if cfg.attempts > 2 else ""
    return (
        f"{ranks.launcher()} eval.py --model {cfg.out}/{plan_of(cfg.stage)[-1][1]}{task}, "
        f"or python eval.py --plot {cfg.out}"
    )


def check_settings(cfg) -> None:
    """Raise InputError for a setting that cannot work, before anything is written."""
    check_task(cfg.task, data=cfg.data, ids=cfg.ids)
    stages = {stage for stage, _ in plan_of(cfg.stage)}
    if cfg.attempts < 2 or ("1b" in stages and cfg.attempts < 3):
        least = 3 if "1b" in stages else 2
        raise InputError(f"--attempts {cfg.attempts} is too few: --stage {cfg.stage} needs {least}")
    if cfg.attempts > 2 and stages & {"0", *SFT}:
        raise InputError(f"--attempts {cfg.attempts} is for stages 1, 1b and 2: leave it out")
    if cfg.offline and stages & {"0", "1b", *SFT}:
        raise InputError(f"--offline {cfg.offline} is for stages 1 and 2: leave it out")
    if cfg.adaptive_beta2 and not (cfg.beta2 and stages & {"1", "1b"}):
        raise InputError("--adaptive-beta2 is for Stage I with a --beta2 above 0: leave it out")
    positive = ("steps1", "steps2", "batch", "lr", "clip", "max_new_tokens", "temperature")
    for name in (*positive, "rows", "micro_tokens", "save_every", "show_every", "problems"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise InputError(f"{as_flag(name)} {getattr(cfg, name)} must be positive and finite")
    if cfg.temperature < COLDEST:
        raise InputError(f"--temperature {cfg.temperature} is too low: give {COLDEST} or more")
    if abs(cfg.seed) >= 2**63:
        raise InputError(f"--seed {cfg.seed} is too large: give less than 2**63")
    for name in ("alpha", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"{as_flag(name)} {getattr(cfg, name)} must be 0 or more, and finite")
    if cfg.k < 2:
        raise InputError(f"--k {cfg.k} leaves no sibling for the baseline: give 2 or more")
    if cfg.batch % cfg.k:
        raise InputError(f"--batch {cfg.batch} is not divisible by --k {cfg.k}: change one of them")
    if not 0 <= cfg.offline <= 1:
        raise InputError(f"--offline {cfg.offline} is a share of the problems: give 0 to 1")
    check_precision(cfg.precision)
    if cfg.recompute not in (0, 1):
        raise InputError(f"--recompute {cfg.recompute} must be 0 or 1")
    if cfg.model == "builtin" and cfg.task != "sums":
        raise InputError(f"--model builtin can only add: name a model for --task {cfg.task}")


@contextlib.contextmanager
def alone_in(folder: Path):
    """Let no other command write to a folder meanwhile; one that stays empty is taken away again.

    The lock is the system's (flock), and ends with the process however that ends.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    lock = ranks.together(lock_folder, folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()


def lock_folder(folder: Path) -> int | None:
    """The lock of a folder that is made if it is missing; the first process holds it for all."""
    file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
    if file:
        raise InputError(f"--out {folder} is not a folder, since {file} is a file: name another")
    if ranks.rank():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be a folder: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {folder} is in use: wait, or name another folder") from error
    except OSError:
        pass  # a file system without locks
    return lock


def settings_to_follow(folder: Path, typed: dict) -> dict:
    """{} for a new run, the settings of Stage I for a Stage II after it; InputError for others."""
    settings = read_json(folder / "config.json").get("settings")
    if not (folder / "metrics.jsonl").exists():
        found = {path.name.removesuffix(".part") for path in folder.glob("*")}
        if settings is None and not found <= BEGUN:  # a run that was killed while it began is BEGUN
            raise InputError(f"--out {folder} holds something else than a run: name a new folder")
        return {}
    results = read_json(folder / RESULTS)
    if settings is None:
        raise InputError(f"{folder / 'config.json'} is missing: restore it, or name another --out")
    finished = {name for _, name in plan_of(settings["stage"])} <= set(results)
    follows = "stage1" in results and "stage2" not in results
    if typed.get("stage") != "2" or not finished or not follows:
        raise InputError(
            f"--out {folder} holds a run already: go on with it by --resume if it was "
            "interrupted, or begin a new one with another --out, maybe from a checkpoint by --init"
        )
    for name in ("model", "task"):
        if typed.get(name, settings[name]) != settings[name]:
            raise InputError(f"--{name} must stay that of the run in {folder}: leave it out")
    return {name: value for name, value in settings.items() if name not in ("stage", "init")}


def base_in(folder: Path, model: str) -> str:
    """The base model of the run in a folder, whose --model this is."""
    return str(folder / "base") if model == "builtin" else model


def read_settings(folder: Path, typed: dict) -> dict:
    """The settings of the run in `folder`; InputError if a flag that was typed differs."""
    settings = read_json(folder / "config.json").get("settings")
    if settings is None:
        raise InputError(f"--out {folder} holds no run to resume: leave out --resume to begin one")
    for name in sorted(set(typed) - {"resume", "out"}):
        if typed[name] != settings.get(name):
            raise InputError(
                f"{as_flag(name)} {typed[name]} differs from the run's {settings.get(name)}: "
                "--resume goes on with a run as it was, so leave the flag out"
            )
    return settings


def begin(typed: dict, configure) -> tuple:
    """Settings, run, checkpoint to start from, and whether its base is the one in the folder.

    A new run, or Stage II after a finished Stage I; configure makes settings of typed flags.
    """
    folder = Path(configure(typed).out)
    followed = settings_to_follow(folder, typed)
    cfg, run = configure({**followed, **typed}), Run(folder)
    check_settings(cfg)
    load_problems(cfg.task, "train", 1, cfg.data, cfg.ids)  # before models take their time
    init = cfg.init
    if followed:
        run.lines = read_metrics(folder / "metrics.jsonl")
        run.results = read_json(folder / RESULTS)
        last = plan_of(read_json(folder / "config.json")["settings"]["stage"])[-1][1]
        init = init or str(folder / last)
    elif plan_of(cfg.stage)[0][0] in ("1b", "2") and not init:
        raise InputError(
            f"--stage {cfg.stage} needs a Stage I, and --out {cfg.out} has none: run --stage 1 "
            "first, or name a checkpoint with --init"
        )
    earlier = read_json(folder / "config.json").get("settings", {})
    return cfg, run, init, bool(followed) or earlier.get("seed") == cfg.seed


def resume(typed: dict, configure) -> tuple:
    """Settings and run in --out, and where it stood when it was last saved."""
    folder = Path(configure(typed).out)
    settings = read_settings(folder, typed)
    if set(settings) != set(vars(configure(typed))):
        raise InputError(f"{folder}/config.json is of another version of score.py: use that one")
    cfg = configure({**settings, "out": str(folder)})
    check_task(cfg.task)
    run, where = read_run(folder)
    if where["stage"] != cfg.stage:
        raise InputError(f"the run in {folder} was killed before --stage 2 began: type that again")
    return cfg, run, where


def write_config(run: Run, settings: dict) -> None:
    """config.json: all that is needed to do the run again, and the commands before."""
    earlier = read_json(run.folder / "config.json")
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers)}
    before = [*earlier.pop("earlier", []), earlier] if earlier else []
    record = {"settings": settings, "versions": versions, "commit": commit, "earlier": before}
    write_atomically(run.folder / "config.json", json.dumps(record, indent=2))


# --- 2. State ----------------------------------------------------------------------------------


def save_state(run: Run, tensors: dict, where: dict) -> None:
    """All that --resume needs, in one folder that is replaced at once.

    tensors: by name, of which each process has its share; where: what all have alike.
    """
    part = run.folder / "state.part"
    if ranks.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    ranks.together(check_shared, run.folder)
    ranks.save(tensors, part)
    logs = [run.folder / name for name in LOGS]
    sizes = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}
    write_atomically(part / "where.json", json.dumps({**where, "sizes": sizes}))
    if ranks.rank() == 0:
        move_in(part, run.folder / "state")


def check_shared(folder: Path) -> None:
    """Raise InputError on a node that does not see what the first process wrote."""
    if not (folder / RESULTS).exists():
        raise InputError(f"--out {folder} is not the same on all nodes: name a shared folder")


def state_folder(folder: Path) -> Path:
    """Where the state is, even if a kill fell between the two moves of a save."""
    state, old = folder / "state", folder / "state.old"
    return old if old.exists() and not state.exists() else state


def read_run(folder: Path) -> tuple[Run, dict]:
    """The run and where it stood when it was last saved; a damaged file is named, and kept."""
    state = state_folder(folder)
    if not state.exists():
        raise InputError(f"--out {folder} holds no run to resume: leave out --resume to begin one")
    where = read_json(state / "where.json")
    if not {"progress", "stage", "sizes"} <= set(where):
        raise InputError(f"{state / 'where.json'} is missing: restore it, or begin anew with --out")
    sizes = where["sizes"]
    for name, size in sizes.items():
        if size > ((folder / name).stat().st_size if (folder / name).exists() else 0):
            raise InputError(f"{folder / name} is damaged (cut short), and kept: restore it")
    run = Run(folder, results=read_json(folder / RESULTS))
    if "base, sampled" not in run.results:
        raise InputError(f"{folder / RESULTS} is damaged or missing: restore it")
    if sizes["metrics.jsonl"]:
        run.lines = read_metrics(folder / "metrics.jsonl", sizes["metrics.jsonl"])
    return run, where


def load_state(run: Run, tensors: dict, where: dict) -> None:
    """Read the tensors in place, and cut the logs back to where they were saved."""
    ranks.load(tensors, state_folder(run.folder))
    for name, size in where["sizes"].items():  # what came after the last save is done again
        if ranks.rank() == 0 and (run.folder / name).exists():
            os.truncate(run.folder / name, size)


# --- 3. Alarms ---------------------------------------------------------------------------------

ALARM_STEPS = 50  # an alarm looks at the mean of so many steps
ALARM_METRICS = ("acc_t1", "acc_t2", "copied", "cut_off", "kl_t1", "kl_t2")


def raise_alarms(lines: list[dict], base: dict, progress: Progress, fresh: bool) -> list[str]:
    """The alarms that go off at the last line; each is printed and raised once.

    base: metrics of the base model, sampled. fresh: the policy began as a copy of the base. In SFT
    another model is sampled than the one that learns: no alarm is about it.
    """
    if lines[-1]["stage"] in SFT:
        return []
    window = lines[-min(ALARM_STEPS, progress.step) :]
    full = len(window) == ALARM_STEPS
    mean = {key: sum(line[key] for line in window) / len(window) for key in ALARM_METRICS}
    fell = mean["acc_t1"] < base["acc_t1"] - 0.05 and mean["acc_t2"] > base["acc_t2"]
    moved = fresh and len(lines) == 1 and mean["kl_t1"] + mean["kl_t2"] > 1e-3
    alarms = {
        "collapse: over 95 % of the answers are copied": full and mean["copied"] > 0.95,
        "sabotage: acc@t1 fell 5 points below the base while acc@t2 rose": full and fell,
        "cut off: over 10 % of attempts, raise --max-new-tokens": full and mean["cut_off"] > 0.1,
        "KL not zero at step 0: policy and reference differ": moved,
    }
    new = [text for text, on in alarms.items() if on and text not in progress.raised]
    for text in new:
        tqdm.write(f"alarm at step {lines[-1]['step']}: {text}")
    progress.raised += new
    return new
