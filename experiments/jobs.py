"""Runs of score.py and eval.py, several at a time; finished ones are not repeated."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.run import get_args_parser
from tqdm import tqdm

import runs
from data import InputError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """A command of one of our scripts; it is done when `key` is in the JSON file it writes."""

    name: str
    folder: Path
    script: str
    flags: list[str]
    file: str
    key: str

    def done(self) -> bool:
        return self.key in runs.read_json(self.folder / self.file)


@dataclass
class Running:
    """The commands that run now; once `stopped`, no other begins."""

    processes: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False

    def stop(self) -> None:
        """Tell all to save and end, once: a second signal would not let them save."""
        told, self.stopped = self.stopped, True
        for process in [] if told else list(self.processes):
            process.terminate()


def do(job: Job, launcher: list[str], running: Running, threads: int) -> None:
    """Begin a job, or go on with it, unless it is done."""
    if running.stopped or job.done():
        return
    begun = job.script != "eval.py" and (job.folder / "metrics.jsonl").exists()
    flags = ["--resume"] if begun else job.flags
    command = [*launcher, str(ROOT / job.script), "--out", str(job.folder), *flags]
    limit = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **limit}
    log = job.folder.with_name(job.folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        running.processes.append(process)
        if running.stopped:  # stop() came before the process was listed
            process.terminate()
        status = process.wait()
        running.processes.remove(process)
    if not running.stopped and (status or not job.done()):
        running.stop()
        last = log.read_text().replace("\r", "\n").strip().splitlines()[-1]
        raise InputError(f"{job.name} ended with status {status}, see {log}: {last}")


def do_all(waves: list[list[Job]], jobs: int, launcher: list[str], threads: int = 1) -> None:
    """Do the waves in turn, `jobs` at a time; at an error or a signal, tell all running to save."""
    running = Running()
    with tqdm(total=sum(map(len, waves)), desc="reproduce", unit="run") as bar:
        for wave in waves:
            with ThreadPoolExecutor(jobs) as pool:
                begun = [pool.submit(do, job, launcher, running, threads) for job in wave]
                try:
                    for one in as_completed(begun):
                        one.result()
                        bar.update()
                except BaseException:
                    running.stop()
                    raise


def launch(gpus: int) -> list[str]:
    """The words before a script: Python, or torchrun with time enough to end a step and save."""
    if not gpus:
        return [sys.executable]
    patience = ["--shutdown_timeout=600"] * (
        "--shutdown_timeout" in get_args_parser().format_help()
    )
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", *patience]
