"""What a run keeps on disk: checkpoints, the run folder, and the state to resume from.

    runs/sums/  config.json     settings, versions, git commit
                metrics.jsonl   one line for each step
                samples.txt     transcripts to read; episodes.jsonl: as data
                results.json    metrics of base and stages on held-out problems
                base/  stage1/  stage2/     save_pretrained folders with their tokenizer
                state/          weights, Adam and progress, for --resume
                eval/           evaluations of the checkpoints, by eval.py
                curve.png       drawn by `python eval.py --plot` (figures.py); report.html

What a run needs is written under another name and then renamed, so that a killed run never leaves
half a file. Logs are appended to; state/ holds their lengths, and --resume cuts them back to these.
With several processes, the first one writes all text files, and each writes its share of state/.
Next to read: sample.py.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import ranks
from config import (
    PATHS,
    Config,
    Stage,
    as_flag,
    check_settings,
    configure,
    plan_of,
    with_absolute_paths,
)
from data import InputError, check_splits
from models import replace_folder
from tasks import check_task, load_problems

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METRICS, SAMPLES, EPISODES = LOGS = "metrics.jsonl", "samples.txt", "episodes.jsonl"
RESULTS = "results.json"
BEGUN = {"base", RESULTS, "state", SAMPLES, EPISODES}  # written before config.json


@dataclass
class Run:
    """A run folder, the lines of its metrics.jsonl, and its results.json by model."""

    folder: Path
    lines: list[dict] = field(default_factory=list)
    results: dict[str, dict] = field(default_factory=dict)
    signal: int = 0  # its number, once it came: save and stop after this step
    board: object = None  # TensorBoard's writer

    def log(self, line: dict) -> None:
        """Add one step to metrics.jsonl, and to TensorBoard with --tensorboard 1."""
        self.lines.append(line)
        self.append(METRICS, json.dumps(line) + "\n")
        if self.board:
            parts = {"train": line, "held out": line.get("held_out", {})}
            for part, values in parts.items():
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self.board.add_scalar(f"{part}/{name}", value, line["step"])
            self.board.flush()

    def open_board(self) -> None:
        """Open the folder that TensorBoard reads; a resumed run goes on in it."""
        if not ranks.rank():
            writer = tensorboard_writer()
            self.board = writer(self.folder / "tensorboard", purge_step=len(self.lines))

    def append(self, log: str, text: str) -> None:
        """Add text to a log; only the first process writes."""
        if text and not ranks.rank():
            with (self.folder / log).open("a", encoding="utf-8") as file:
                file.write(text)

    def write_results(self, name: str, metrics: dict) -> None:
        self.results[name] = metrics
        write_atomically(self.folder / RESULTS, json.dumps(self.results, indent=2))

    def stop_on_signals(self) -> None:
        """Let a run that gets Ctrl-C or SIGTERM end its step, save and stop; a second one kills it.

        Under torchrun a second one does nothing here: torchrun may send the same signal twice, and
        it kills the processes itself after its --shutdown_timeout.
        """

        def stop(number, _frame):
            self.signal = number
            if not ranks.rank():  # not by print, which the signal may have interrupted
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")
            if ranks.launcher() == "python":
                signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


@dataclass
class Progress:
    """Where a run stands. Random numbers come from (seed, step), so they need no state."""

    index: int = 0  # of the stage in the plan
    step: int = 0  # updates done in that stage
    best: float = -1.0  # mean reward of the kept checkpoint, over the steps between two saves
    raised: list[str] = field(default_factory=list)  # alarms so far
    beta2: float = 0.0  # of the next step


def tensorboard_writer():
    """torch's SummaryWriter; InputError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard 1 needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


# --- 1. Text files ---------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; only the first process writes."""
    if ranks.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if the file does not exist; InputError if it is damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged, and was not changed: restore it") from error


def read_log(path: Path, size: int | None = None) -> list[dict]:
    """The complete lines of a log, or of its first `size` bytes; InputError names a damaged one."""
    if not path.exists():
        raise InputError(f"{path} is missing: name a run folder of score.py")
    lines, (*whole, _being_written) = [], path.read_bytes()[:size].split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path} is damaged in line {number}, and was not changed: restore it"
            ) from error
    return lines


def as_words(flags: dict) -> str:
    """The flags that are not empty, as words for a shell."""
    given = {as_flag(name): str(value) for name, value in flags.items() if value != ""}
    return "".join(f" {name} {shlex.quote(value)}" for name, value in given.items())


def train_command(cfg: Config, flags: str) -> str:
    """The command that goes on with a run, by these flags."""
    out = "" if cfg.out == Config.out else cfg.out
    return f"{ranks.launcher()} score.py {flags}{as_words({'out': out})}"


def eval_command(cfg: Config, checkpoint: str) -> str:
    """The command that evaluates a checkpoint, with as many attempts as in its finished run."""
    attempts = cfg.attempts if cfg.attempts > 2 else ""
    flags = {"model": f"{cfg.out}/{checkpoint}", "attempts": attempts}
    return f"{ranks.launcher()} eval.py{as_words(flags)}"


@contextlib.contextmanager
def disk_errors_explained():
    """Say in one sentence which file cannot be written, and that earlier saves are kept."""
    kinds = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
    try:
        yield
    except OSError as error:
        if error.errno not in {*kinds, errno.EIO}:
            raise
        where = f"{error.filename} " if error.filename else "a file "
        raise InputError(
            f"{where}cannot be written ({error.strerror}): make room or name another --out; "
            "what was saved before is kept"
        ) from error


@contextlib.contextmanager
def locked(folder: Path):
    """Let no other command write to a folder meanwhile; a new folder that stays empty is removed.

    The lock is the system's (flock). It ends with the process, even with a killed one. On Windows
    there is no lock.
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
    """Make a folder if it is missing, and lock it; the first process holds the lock for all."""
    file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
    if file:
        raise InputError(f"--out {folder} is not a folder, since {file} is a file: name another")
    if ranks.rank():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if fcntl is None:
            return None
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror
        raise InputError(f"--out {folder} cannot be written ({reason}): name another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {folder} is in use: wait, or name another folder") from error
    except OSError:
        pass  # a file system without locks: go on without one
    return lock


def settings_to_follow(folder: Path, typed: dict, stages: dict[str, Stage]) -> dict:
    """The settings of the run in `folder` that this one goes on from; {} for a new run.

    Only a stage such as II can go on, from a finished Stage I. Raises InputError for all else.
    """
    first, *others = plan_of(configure(typed).stage, stages)
    settings = read_json(folder / "config.json").get("settings")
    if not (folder / METRICS).exists():
        found = {path.name.partition(".part")[0].partition(".old")[0] for path in folder.glob("*")}
        if settings is None and not found <= BEGUN:  # a run killed as it began has no others
            raise InputError(f"--out {folder} holds no run, but other files: name a new folder")
        return {}
    results = read_json(folder / RESULTS)
    if settings is None:
        raise InputError(f"{folder / 'config.json'} is missing: restore it, or name another --out")
    finished = {stage.folder for stage in plan_of(settings["stage"], stages)} <= set(results)
    can_follow = first.follows and first.reference == "base" and first.folder not in results
    if others or not can_follow or not finished or stages[first.follows].folder not in results:
        raise InputError(
            f"--out {folder} holds a run already: go on with it by --resume if it was interrupted, "
            "or begin a new one with another --out (--init CHECKPOINT: from a checkpoint)"
        )
    check_version(settings, folder)
    for name in ("model", "task", "lora"):
        if with_absolute_paths(typed).get(name, settings[name]) != settings[name]:
            raise InputError(f"--{name} {typed[name]} differs from the run's: leave it out")
    settings["out"] = str(folder)  # the folder may have been moved
    return {name: value for name, value in settings.items() if name not in ("stage", "init")}


def of_this_version(settings: dict) -> bool:
    return set(settings) == set(vars(Config()))


def check_version(settings: dict, folder: Path) -> None:
    """Raise InputError if another version of score.py wrote these settings."""
    if not of_this_version(settings):
        raise InputError(f"{folder}/config.json is by another version of score.py: use that one")


def base_of_run(folder: Path, model: str) -> str:
    """The base model of the run in `folder`; `model` is the run's --model."""
    return str(folder / "base") if model == "builtin" else model


def prepare_run(typed: dict, stages: dict[str, Stage]) -> tuple:
    """Settings, plan and run, the checkpoint to start from, and whether base/ can be used again."""
    first = configure(typed)
    folder, plan = Path(first.out), plan_of(first.stage, stages)
    earlier = read_json(folder / "config.json").get("settings", {})
    follows = {n: earlier[n] for n in vars(first) if plan[0].follows and n in earlier}
    check_settings(configure(follows | {"init": "", "stage": first.stage} | typed), plan)
    followed = settings_to_follow(folder, typed, stages)
    cfg, run = configure(with_absolute_paths({**followed, **typed})), Run(folder)
    if cfg.tensorboard:
        tensorboard_writer()
    load_problems(cfg.task, "train", 1, cfg.data, cfg.ids, cfg.columns)  # before any model
    if cfg.task.endswith(".py"):
        splits = {split: load_problems(cfg.task, split, None) for split in ("train", "test")}
        check_splits(splits, f"--task {cfg.task}")
    init = cfg.init
    if followed:
        if not typed.keys() & {"data", "columns", "ids", "prompt", "correction"}:
            check_inputs(cfg, read_json(folder / "config.json").get("inputs", {}))
        run.lines = read_log(folder / METRICS)
        run.results = read_json(folder / RESULTS)
        init = init or str(folder / list(run.results)[-1])
    elif plan[0].follows and not init:
        raise InputError(
            f"--stage {cfg.stage} goes on from a stage {plan[0].follows}, and --out {cfg.out} has "
            f"none: run --stage {plan[0].follows} first, or name a checkpoint with --init"
        )
    return cfg, plan, run, init, bool(followed) or earlier.get("seed") == cfg.seed


def reopen_run(typed: dict, stages: dict[str, Stage]) -> tuple:
    """Settings, plan and run in --out, what its last save holds, and its base's fingerprint.

    Two changes may be typed: more steps, and the new place of a file or folder that was moved.
    """
    folder = Path(configure(typed).out)
    record = read_json(folder / "config.json")
    settings, typed = record.get("settings"), with_absolute_paths(typed)
    if settings is None:
        raise InputError(
            f"--out {folder} holds no run to resume: name another --out, or leave out --resume"
        )
    check_version(settings, folder)
    for name in sorted(set(typed) - {"resume", "out", "steps1", "steps2"}):
        before = settings[name]
        moved = name in (*PATHS, "task") and os.path.isabs(before) and not os.path.exists(before)
        if typed[name] != before and not moved:
            raise InputError(
                f"{as_flag(name)} {typed[name]} differs from the run's {before}: "
                "--resume goes on with a run as it was, so leave the flag out"
            )
    cfg = configure({**settings, **typed, "out": str(folder), "resume": False})
    check_task(cfg.task, data=cfg.data, columns=cfg.columns)
    run, where = read_run(folder)
    if (begun := where["stage"]) != cfg.stage:
        raise InputError(
            f"--stage {begun} in {folder} was killed at its start: give it again without --resume"
        )
    plan = plan_of(cfg.stage, stages)
    check_settings(cfg, plan)
    check_more_steps(settings, cfg, plan, where["progress"])
    check_inputs(cfg, record.get("inputs", {}))
    return cfg, plan, run, where, record.get("base")


def check_inputs(cfg: Config, before: dict[str, str]) -> None:
    """Raise InputError if a file or data set that a flag names has changed since the run began."""
    for name in changed_inputs(cfg, before):
        raise InputError(
            f"--{name} {getattr(cfg, name)} has changed since the run in {cfg.out} began: "
            "restore it, or begin a new run"
        )


def changed_inputs(cfg: Config, before: dict[str, str]) -> list[str]:
    """The flags that name a file or data set with another digest than `before`."""
    return [name for name, digest in digests(cfg).items() if digest != before.get(name)]


def check_more_steps(settings: dict, cfg: Config, plan: list[Stage], progress: dict) -> None:
    """Raise InputError if a new --steps1 or --steps2 comes too late for every stage."""
    left = plan[progress["index"] :]
    for name in ("steps1", "steps2"):
        steps, before = getattr(cfg, name), settings[name]
        if steps == before:
            continue
        if all(stage.steps != name for stage in left):
            raise InputError(
                f"--{name} {steps} is too late, since its stage ended after {before} steps: begin "
                "a new run"
            )
        if left[0].steps == name and steps < progress["step"]:
            done = progress["step"]
            raise InputError(
                f"--{name} {steps} is less than the {done} steps that were made: give more"
            )


def is_finished(cfg: Config, plan: list[Stage], run: Run, progress: Progress) -> bool:
    """Is the last stage at its last step, and evaluated?"""
    at_the_end = progress.index == len(plan) - 1 and plan[-1].folder in run.results
    return at_the_end and progress.step == getattr(cfg, plan[-1].steps)


def check_space(folder: Path, weights: int, size: int, stages: int, states: int) -> None:
    """Raise InputError if there is no room for what a run writes.

    weights: number of weights. size: bytes of a weight in a checkpoint. There are `stages`
    checkpoints, and one that is being written. states: number of state folders; each has 12 bytes
    for a weight, which are the weight in float32 and Adam's two means.
    """
    needed = weights * (size * (stages + 1) + 12 * states)
    free = shutil.disk_usage(folder).free
    if free < needed:
        needed, free = (f"{number / 1e9:.1f} GB" for number in (needed, free))
        raise InputError(f"--out {folder} needs {needed}, but only {free} are free: name another")


def digests(cfg: Config) -> dict[str, str]:
    """A digest for each flag that names words, a task file or problems: it tells if they change."""
    texts = {name: getattr(cfg, name) for name in ("prompt", "correction")}
    texts |= {"task": cfg.task} if cfg.task.endswith(".py") else {}
    found = {name: Path(path).read_bytes() for name, path in texts.items() if path}
    if cfg.data:
        named = cfg.data, cfg.ids, cfg.columns
        splits = [load_problems(cfg.task, split, None, *named) for split in ("train", "test")]
        found["data"] = json.dumps([(p.question, p.answer) for p in sum(splits, ())]).encode()
    return {name: hashlib.blake2b(x, digest_size=8).hexdigest() for name, x in found.items()}


def write_config(run: Run, cfg: Config, typed: dict, base: str) -> None:
    """Write config.json: all that is needed to repeat the run, and the same of earlier commands.

    settings: with absolute paths. typed: the flags as they were typed. inputs: the `digests` of
    what they name. base: the models.fingerprint of the base model.
    """
    settings = vars(cfg) | {"out": os.path.abspath(cfg.out)}
    earlier = read_json(run.folder / "config.json")
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers)}
    before = [*earlier.pop("earlier", []), earlier] if earlier else []
    record = {"settings": settings, "typed": typed, "inputs": digests(cfg), "base": base}
    record |= {"versions": versions, "commit": commit, "earlier": before}
    write_atomically(run.folder / "config.json", json.dumps(record, indent=2))


# --- 2. State ----------------------------------------------------------------------------------


def write_state(run: Run, tensors: dict, where: dict) -> None:
    """Write all that --resume needs, into one folder that is replaced as a whole.

    tensors: by name; each process has its share of them. where: values that all processes share.
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
        raise InputError(f"--out {folder} is not the same folder on all nodes: name a shared one")


def state_folder(folder: Path) -> Path:
    """The folder of the last state, even if a save was killed between its two renames."""
    state, old = folder / "state", folder / "state.old"
    return old if old.exists() and not state.exists() else state


def read_run(folder: Path) -> tuple[Run, dict]:
    """The run and what its last save holds; InputError names a damaged file, which is kept."""
    state = state_folder(folder)
    if not state.exists():
        raise InputError(
            f"--out {folder} holds no run to resume: name another --out, or leave out --resume"
        )
    where = read_json(state / "where.json")
    if not {"progress", "stage", "sizes"} <= set(where):
        raise InputError(f"{state / 'where.json'} is incomplete or missing: restore it")
    sizes = where["sizes"]
    for name, size in sizes.items():
        if size > ((folder / name).stat().st_size if (folder / name).exists() else 0):
            raise InputError(f"{folder / name} is cut short, and was not changed: restore it")
    run = Run(folder, results=read_json(folder / RESULTS))
    if "base, sampled" not in run.results:
        raise InputError(f"{folder / RESULTS} is damaged or missing: restore it")
    if sizes[METRICS]:
        run.lines = read_log(folder / METRICS, sizes[METRICS])
    return run, where


def read_state(run: Run, tensors: dict, where: dict) -> None:
    """Read the tensors in place, and cut the logs back to their length at the last save."""
    ranks.load_sharded(tensors, state_folder(run.folder))
    for name, size in where["sizes"].items():  # later steps are made again
        if ranks.rank() == 0 and (run.folder / name).exists():
            os.truncate(run.folder / name, size)


# --- 3. Alarms ---------------------------------------------------------------------------------

ALARM_STEPS = 50  # an alarm looks at means over so many steps of a stage
ALARM_METRICS = "acc_t1 acc_t2 copied cut_off unreadable kl_t1 kl_t2".split()


def raise_alarms(lines: list[dict], base: dict, progress: Progress, fresh: bool) -> list[str]:
    """Print and return the alarms that begin at the last line; each is raised once in a run.

    base: metrics of the sampled base model. fresh: the policy began as a copy of the base model.
    """
    window, first = lines[-min(ALARM_STEPS, progress.step) :], fresh and len(lines) == 1
    full = first or len(window) == ALARM_STEPS
    mean = {key: sum(line[key] for line in window) / len(window) for key in ALARM_METRICS}
    if first:  # the policy still is the base model, which attempted more problems
        mean |= {key: base[key] for key in ALARM_METRICS if key in base}
    fell = mean["acc_t1"] < base["acc_t1"] - 0.05 and mean["acc_t2"] > base["acc_t2"]
    unpaid = mean["acc_t1"] + mean["acc_t2"] == 0 or mean["unreadable"] > 0.95
    collapsed = mean["copied"] > max(0.95, base["copied"]) and not unpaid
    moved = first and mean["kl_t1"] + mean["kl_t2"] > 1e-3
    alarms = {
        "no reward: no attempt is right, or hardly one states an answer: see in samples.txt "
        "if attempts end in the form that the task reads": full and unpaid,
        "collapse: over 95 % of the answers are copied": full and collapsed,
        "sabotage: acc@t1 fell 5 points below the base while acc@t2 rose": full and fell,
        "cut off: over 10 % of attempts, raise --max-new-tokens": full and mean["cut_off"] > 0.1,
        "KL not zero at step 0: policy and reference differ": moved,
        "sampled and scored differ, by over .5 nats a token": lines[-1]["on_policy_gap"] > 0.5,
    }
    new = [text for text, on in alarms.items() if on and text not in progress.raised]
    for text in new:
        tqdm.write(f"alarm at step {lines[-1]['step']}: {text}")
    progress.raised += new
    return new
