"""What is kept: checkpoints, the run folder, and the state to resume from.

    runs/sums/  config.json     settings, versions, git commit
                metrics.jsonl   one line a step
                samples.txt     transcripts to read; as data: episodes.jsonl
                results.json    metrics of base and stages on held-out problems
                base/  stage1/  stage2/     save_pretrained folders with their tokenizer
                state/          weights, Adam and progress, for --resume
                eval/           evaluations of the checkpoints, by eval.py
                curve.png       drawn by `python eval.py --plot` (figures.py); report.html

What a run needs is written beside its place and then moved there: a kill never leaves half of it.
The logs grow; state/ remembers how long they were, and --resume cuts them back to that. Of many
processes the first writes text, all write state/. Next to read: sample.py.
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
from data import InputError
from models import replace_folder
from tasks import check_task, load_problems

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METRICS, SAMPLES, EPISODES = LOGS = "metrics.jsonl", "samples.txt", "episodes.jsonl"
RESULTS = "results.json"
BEGUN = {"base", RESULTS, "state", SAMPLES, EPISODES}  # what is written before config.json


@dataclass
class Run:
    """A run folder, the lines of its metrics.jsonl, and its results.json by model."""

    folder: Path
    lines: list[dict] = field(default_factory=list)
    results: dict[str, dict] = field(default_factory=dict)
    signal: int = 0  # that came: save and leave after this step
    board: object = None  # TensorBoard's writer

    def log(self, line: dict) -> None:
        """Add one step to metrics.jsonl, and to TensorBoard if it is asked for."""
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
        """Begin, or go on with, what TensorBoard reads."""
        if not ranks.rank():
            writer = tensorboard_writer()
            self.board = writer(self.folder / "tensorboard", purge_step=len(self.lines))

    def append(self, log: str, text: str) -> None:
        """Add to a log; of many processes the first does."""
        if text and not ranks.rank():
            with (self.folder / log).open("a", encoding="utf-8") as file:
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
            if not ranks.rank():  # not print: the signal may have come within one
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
    best: float = -1.0  # reward of the checkpoint kept, over the steps between two saves
    raised: list[str] = field(default_factory=list)  # alarms
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


def read_log(path: Path, size: int | None = None) -> list[dict]:
    """The whole lines of a log, or of its first `size` bytes; a damaged line is named."""
    if not path.exists():
        raise InputError(f"{path} is missing: name a run folder of score.py")
    lines, (*whole, _being_written) = [], path.read_bytes()[:size].split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged in line {number}, and kept: restore it") from error
    return lines


def as_words(flags: dict) -> str:
    """Flags that are not empty, as they are typed in a shell."""
    given = {as_flag(name): str(value) for name, value in flags.items() if value != ""}
    return "".join(f" {name} {shlex.quote(value)}" for name, value in given.items())


def train_command(cfg: Config, flags: str) -> str:
    """The command that goes on with a run."""
    out = "" if cfg.out == Config.out else cfg.out
    return f"{ranks.launcher()} score.py {flags}{as_words({'out': out})}"


def eval_command(cfg: Config, checkpoint: str) -> str:
    """The command that evaluates a checkpoint of a finished run, as the run asked."""
    attempts = cfg.attempts if cfg.attempts > 2 else ""
    flags = {"model": f"{cfg.out}/{checkpoint}", "attempts": attempts}
    return f"{ranks.launcher()} eval.py{as_words(flags)}"


@contextlib.contextmanager
def disk_errors_explained():
    """Say in one sentence what file cannot be written, and that what was saved is kept."""
    kinds = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
    try:
        yield
    except OSError as error:
        if error.errno not in {*kinds, errno.EIO}:
            raise
        where = f"{error.filename} " if error.filename else ""
        raise InputError(
            f"{where}cannot be written ({error.strerror}): make room or name another --out; "
            "what was saved before is kept"
        ) from error


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
        pass  # a file system without locks
    return lock


def settings_to_follow(folder: Path, typed: dict, stages: dict[str, Stage]) -> dict:
    """{} for a new run, the settings of Stage I for a Stage II after it; InputError for others."""
    first, *others = plan_of(configure(typed).stage, stages)
    settings = read_json(folder / "config.json").get("settings")
    if not (folder / METRICS).exists():
        found = {path.name.partition(".part")[0].partition(".old")[0] for path in folder.glob("*")}
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
    check_version(settings, folder)
    for name in ("model", "task", "lora"):
        if with_absolute_paths(typed).get(name, settings[name]) != settings[name]:
            raise InputError(f"--{name} must stay that of the run in {folder}: leave it out")
    settings["out"] = str(folder)  # it may have been moved
    return {name: value for name, value in settings.items() if name not in ("stage", "init")}


def check_version(settings: dict, folder: Path) -> None:
    """Raise InputError for settings that are not those of this version."""
    if set(settings) != set(vars(Config())):
        raise InputError(f"{folder}/config.json is of another version of score.py: use that one")


def base_in(folder: Path, model: str) -> str:
    """The base model of the run in a folder, whose --model this is."""
    return str(folder / "base") if model == "builtin" else model


def prepare_run(typed: dict, stages: dict[str, Stage]) -> tuple:
    """Settings, plan, run, checkpoint to start from, and whether the folder has the same base."""
    first = configure(typed)
    folder, plan = Path(first.out), plan_of(first.stage, stages)
    earlier = read_json(folder / "config.json").get("settings", {})
    follows = {n: earlier[n] for n in vars(first) if plan[0].follows and n in earlier}
    check_settings(configure(follows | {"init": "", "stage": first.stage} | typed), plan)
    followed = settings_to_follow(folder, typed, stages)
    cfg, run = configure(with_absolute_paths({**followed, **typed})), Run(folder)
    if cfg.tensorboard:
        tensorboard_writer()
    load_problems(cfg.task, "train", 1, cfg.data, cfg.ids, cfg.columns)  # models take their time
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
    """Settings, plan and run in --out, and where it stood when it was last saved.

    More steps may be typed than it had, and a file or folder anew that is no longer where it was.
    """
    folder = Path(configure(typed).out)
    record = read_json(folder / "config.json")
    settings, typed = record.get("settings"), with_absolute_paths(typed)
    if settings is None:
        raise InputError(f"--out {folder} holds no run to resume: leave out --resume to begin one")
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
        raise InputError(f"--stage {begun} in {folder} was killed as it began: type it again")
    plan = plan_of(cfg.stage, stages)
    check_settings(cfg, plan)
    check_more_steps(settings, cfg, plan, where["progress"])
    check_inputs(cfg, record.get("inputs", {}))
    return cfg, plan, run, where, record.get("base")


def check_inputs(cfg: Config, before: dict[str, str]) -> None:
    """Raise InputError if what the flags name is no longer what it was in the run so far."""
    for name, digest in digests(cfg).items():
        if digest != before.get(name):
            raise InputError(
                f"--{name} {getattr(cfg, name)} has changed since the run in {cfg.out} began: "
                "restore it, or begin a new run"
            )


def check_more_steps(settings: dict, cfg: Config, plan: list[Stage], progress: dict) -> None:
    """Raise InputError for --steps1 or --steps2 that no stage can have that is under way."""
    left = plan[progress["index"] :]
    for name in ("steps1", "steps2"):
        steps, before = getattr(cfg, name), settings[name]
        if steps == before:
            continue
        if all(stage.steps != name for stage in left):
            raise InputError(
                f"--{name} {steps}: its stage is over, and had {before} steps: begin a new run"
            )
        if left[0].steps == name and steps < progress["step"]:
            done = progress["step"]
            raise InputError(f"--{name} {steps} is less than the {done} steps that were made")


def is_finished(cfg: Config, plan: list[Stage], run: Run, progress: Progress) -> bool:
    """Is the last stage at its last step, and evaluated?"""
    at_the_end = progress.index == len(plan) - 1 and plan[-1].folder in run.results
    return at_the_end and progress.step == getattr(cfg, plan[-1].steps)


def check_space(folder: Path, weights: int, size: int, stages: int, states: int) -> None:
    """Raise InputError if there is no room for what a run writes.

    weights: their number; size: bytes of one in a checkpoint, of which there are `stages` and one
    that is being written; states: folders with 12 bytes a weight, float32 weights and Adam's means.
    """
    needed = weights * (size * (stages + 1) + 12 * states)
    free = shutil.disk_usage(folder).free
    if free < needed:
        needed, free = (f"{number / 1e9:.1f} GB" for number in (needed, free))
        raise InputError(f"--out {folder} needs {needed}, and {free} are free: name another")


def digests(cfg: Config) -> dict[str, str]:
    """Tell whether what the flags name has changed: words, task file, problems; by flag."""
    texts = {name: getattr(cfg, name) for name in ("prompt", "correction")}
    texts |= {"task": cfg.task} if cfg.task.endswith(".py") else {}
    found = {name: Path(path).read_bytes() for name, path in texts.items() if path}
    if cfg.data:
        problems = load_problems(cfg.task, "train", None, cfg.data, cfg.ids, cfg.columns)
        found["data"] = json.dumps([(p.question, p.answer) for p in problems]).encode()
    return {name: hashlib.blake2b(x, digest_size=8).hexdigest() for name, x in found.items()}


def write_config(run: Run, cfg: Config, typed: dict, base: str) -> None:
    """config.json: all that is needed to do the run again, and the commands before.

    settings: with absolute paths; typed: flags as they were typed; inputs: `digests` of what they
    name; base: its models.fingerprint.
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
    if sizes[METRICS]:
        run.lines = read_log(folder / METRICS, sizes[METRICS])
    return run, where


def read_state(run: Run, tensors: dict, where: dict) -> None:
    """Read the tensors in place, and cut the logs back to where they were saved."""
    ranks.load_sharded(tensors, state_folder(run.folder))
    for name, size in where["sizes"].items():  # what came after the last save is done again
        if ranks.rank() == 0 and (run.folder / name).exists():
            os.truncate(run.folder / name, size)


# --- 3. Alarms ---------------------------------------------------------------------------------

ALARM_STEPS = 50  # an alarm looks at the mean of so many steps
ALARM_METRICS = "acc_t1 acc_t2 copied cut_off unreadable kl_t1 kl_t2".split()


def raise_alarms(lines: list[dict], base: dict, progress: Progress, fresh: bool) -> list[str]:
    """The alarms that go off at the last line; each is printed and raised once.

    base: metrics of the base model, sampled. fresh: the policy began as a copy of the base.
    """
    window, first = lines[-min(ALARM_STEPS, progress.step) :], fresh and len(lines) == 1
    full = first or len(window) == ALARM_STEPS
    mean = {key: sum(line[key] for line in window) / len(window) for key in ALARM_METRICS}
    if first:  # the policy still is the base model, which attempted more problems
        mean |= {key: base[key] for key in ALARM_METRICS if key in base}
    fell = mean["acc_t1"] < base["acc_t1"] - 0.05 and mean["acc_t2"] > base["acc_t2"]
    unpaid = mean["acc_t1"] + mean["acc_t2"] == 0 or mean["unreadable"] > 0.95
    collapsed = mean["copied"] > max(0.95, base["copied"]) and not unpaid
    moved = fresh and len(lines) == 1 and mean["kl_t1"] + mean["kl_t2"] > 1e-3
    alarms = {
        "no reward: none is right, or hardly one states an answer; read samples.txt": full
        and unpaid,
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
