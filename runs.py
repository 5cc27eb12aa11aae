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
back to that. Of many processes the first writes text, all write state/. Next to read: sample.py.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import ranks
from config import Config, Stage, as_flag, check_settings, configure, plan_of
from data import InputError
from models import replace_folder
from tasks import check_task, load_problems

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
            with (self.folder / name).open("a", encoding="utf-8") as file:
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

    index: int = 0  # of the stage in the plan
    step: int = 0  # updates done in that stage
    best: float = -1.0  # reward of the checkpoint kept, over the steps between two saves
    raised: list[str] = field(default_factory=list)  # alarms
    beta2: float = 0.0  # of the next step


# --- 1. Text files ---------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing; of many processes the first does."""
    if ranks.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file; InputError if it is damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
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


def train_command(cfg: Config, flags: str) -> str:
    """The command that goes on with a run."""
    out = "" if cfg.out == Config.out else f" --out {cfg.out}"
    return f"{ranks.launcher()} score.py {flags}{out}"


def eval_command(cfg: Config, checkpoint: str) -> str:
    """The command that evaluates a checkpoint of a finished run."""
    task = "" if cfg.task == "sums" else f" --task {cfg.task}"
    task += f" --data {cfg.data}" if cfg.data else ""
    task += f" --attempts {cfg.attempts}" if cfg.attempts > 2 else ""
    command = f"{ranks.launcher()} eval.py --model {cfg.out}/{checkpoint}{task}"
    return f"{command}, or python eval.py --plot {cfg.out}"


@contextlib.contextmanager
def locked(folder: Path):
    """Let no other command write to a folder meanwhile; one that stays empty is removed again.

    The lock is the system's (flock), and ends with the process however that ends. Windows has none.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    lock = ranks.on_all_ranks(lock_folder, folder)
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
        if fcntl is None:
            return None
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


def settings_to_follow(folder: Path, typed: dict, stages: dict[str, Stage]) -> dict:
    """{} for a new run, the settings of Stage I for a Stage II after it; InputError for others."""
    first, *others = plan_of(configure(typed).stage, stages)
    settings = read_json(folder / "config.json").get("settings")
    if not (folder / "metrics.jsonl").exists():
        found = {path.name.removesuffix(".part") for path in folder.glob("*")}
        if settings is None and not found <= BEGUN:  # a run that was killed while it began is BEGUN
            raise InputError(f"--out {folder} holds something else than a run: name a new folder")
        return {}
    results = read_json(folder / RESULTS)
    if settings is None:
        raise InputError(f"{folder / 'config.json'} is missing: restore it, or name another --out")
    finished = {stage.folder for stage in plan_of(settings["stage"], stages)} <= set(results)
    can_follow = first.follows and first.reference == "base" and first.folder not in results
    if others or not can_follow or not finished or stages[first.follows].folder not in results:
        raise InputError(
            f"--out {folder} holds a run already: go on with it by --resume if it was "
            "interrupted, or begin a new one with another --out, maybe from a checkpoint by --init"
        )
    for name in ("model", "task"):
        if typed.get(name, settings[name]) != settings[name]:
            raise InputError(f"--{name} must stay that of the run in {folder}: leave it out")
    settings["out"] = str(folder)  # it may have been moved
    return {name: value for name, value in settings.items() if name not in ("stage", "init")}


def base_in(folder: Path, model: str) -> str:
    """The base model of the run in a folder, whose --model this is."""
    return str(folder / "base") if model == "builtin" else model


def prepare_run(typed: dict, stages: dict[str, Stage]) -> tuple:
    """Settings, plan, run, checkpoint to start from, and whether the folder has the same base."""
    folder = Path(configure(typed).out)
    followed = settings_to_follow(folder, typed, stages)
    cfg, run = configure({**followed, **typed}), Run(folder)
    plan = plan_of(cfg.stage, stages)
    check_settings(cfg, plan)
    load_problems(cfg.task, "train", 1, cfg.data, cfg.ids)  # before models take their time
    init = cfg.init
    if followed:
        run.lines = read_metrics(folder / "metrics.jsonl")
        run.results = read_json(folder / RESULTS)
        init = init or str(folder / list(run.results)[-1])
    elif plan[0].follows and not init:
        raise InputError(
            f"--stage {cfg.stage} goes on from a stage {plan[0].follows}, and --out {cfg.out} has "
            f"none: run --stage {plan[0].follows} first, or name a checkpoint with --init"
        )
    earlier = read_json(folder / "config.json").get("settings", {})
    return cfg, plan, run, init, bool(followed) or earlier.get("seed") == cfg.seed


def reopen_run(typed: dict, stages: dict[str, Stage]) -> tuple:
    """Settings, plan and run in --out, and where it stood when it was last saved."""
    folder = Path(configure(typed).out)
    settings = read_json(folder / "config.json").get("settings")
    if settings is None:
        raise InputError(f"--out {folder} holds no run to resume: leave out --resume to begin one")
    for name in sorted(set(typed) - {"resume", "out"}):
        if typed[name] != settings.get(name):
            raise InputError(
                f"{as_flag(name)} {typed[name]} differs from the run's {settings.get(name)}: "
                "--resume goes on with a run as it was, so leave the flag out"
            )
    if set(settings) != set(vars(configure(typed))):
        raise InputError(f"{folder}/config.json is of another version of score.py: use that one")
    cfg = configure({**settings, "out": str(folder)})
    check_task(cfg.task)
    run, where = read_run(folder)
    if (begun := where["stage"]) != cfg.stage:
        raise InputError(f"--stage {begun} in {folder} was killed as it began: type it again")
    return cfg, plan_of(cfg.stage, stages), run, where


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


def write_state(run: Run, tensors: dict, where: dict) -> None:
    """All that --resume needs, in one folder that is replaced at once.

    tensors: by name, of which each process has its share; where: what all have alike.
    """
    part = run.folder / "state.part"
    if ranks.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    ranks.on_all_ranks(check_shared, run.folder)
    ranks.save_sharded(tensors, part)
    logs = [run.folder / name for name in LOGS]
    sizes = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}
    write_atomically(part / "where.json", json.dumps({**where, "sizes": sizes}))
    if ranks.rank() == 0:
        replace_folder(run.folder / "state", part)


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


def read_state(run: Run, tensors: dict, where: dict) -> None:
    """Read the tensors in place, and cut the logs back to where they were saved."""
    ranks.load_sharded(tensors, state_folder(run.folder))
    for name, size in where["sizes"].items():  # what came after the last save is done again
        if ranks.rank() == 0 and (run.folder / name).exists():
            os.truncate(run.folder / name, size)


# --- 3. Alarms ---------------------------------------------------------------------------------

ALARM_STEPS = 50  # an alarm looks at the mean of so many steps
ALARM_METRICS = ("acc_t1", "acc_t2", "copied", "cut_off", "kl_t1", "kl_t2")


def raise_alarms(lines: list[dict], base: dict, progress: Progress, fresh: bool) -> list[str]:
    """The alarms that go off at the last line; each is printed and raised once.

    base: metrics of the base model, sampled. fresh: the policy began as a copy of the base.
    """
    window = lines[-min(ALARM_STEPS, progress.step) :]
    full = len(window) == ALARM_STEPS
    mean = {key: sum(line[key] for line in window) / len(window) for key in ALARM_METRICS}
    fell = mean["acc_t1"] < base["acc_t1"] - 0.05 and mean["acc_t2"] > base["acc_t2"]
    collapsed = mean["copied"] > max(0.95, base["copied"])
    moved = fresh and len(lines) == 1 and mean["kl_t1"] + mean["kl_t2"] > 1e-3
    alarms = {
        "collapse: over 95 % of the answers are copied": full and collapsed,
        "sabotage: acc@t1 fell 5 points below the base while acc@t2 rose": full and fell,
        "cut off: over 10 % of attempts, raise --max-new-tokens": full and mean["cut_off"] > 0.1,
        "KL not zero at step 0: policy and reference differ": moved,
    }
    new = [text for text, on in alarms.items() if on and text not in progress.raised]
    for text in new:
        tqdm.write(f"alarm at step {lines[-1]['step']}: {text}")
    progress.raised += new
    return new
