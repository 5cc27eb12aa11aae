"""Run untrusted Python against its tests. The model that wrote it is paid for whatever passes.

    trainer ── run_many ──▶ judge ── calls, over a socket ──▶ candidate, one for each program
                              └── forks, before any test ──▶ zygote ── forks ──▲

The judge runs the tests itself. When a test calls a function of the program, the judge sends the
arguments to the candidate and gets back plain data (tagged JSON, never pickle). So a program sees
no expected value and no frame of a test, and it cannot decide what is equal. A judge is a new
Python, not a fork of the trainer, so that the trainer's size does not matter. It serves many
programs. Its zygote is forked before the first test arrives, so it holds no test to give away.

Covered on Linux (x86-64, ARM64), for root and other users: a candidate can compute, sleep, start
threads, and read the clock, the standard library and its socket (confine.py). It has half a GB, and
is killed at the time limit. It leaves nothing behind and writes no file, so tempfile does not work.
If a program makes a judge hang or die, the judge is replaced. At most as many programs run at a
time as there are cores, so that a verdict does not depend on the number of programs.

Not covered: gaps in the kernel or in Python's JSON, and a file's time of access. On other systems,
such as macOS, forged replies do not help a program either, but it can reach its user's files,
network and processes, also the judge. stderr says so once. A program that has seen its tests, as
MBPP shows them, can list their answers. A call works on copies of its arguments. Afterwards, the
lists, dicts and sets among the test's own arguments get the values of their copies.
Next to read: judge.py (judge, zygote, candidate).
"""

import atexit
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkers.judge import WALL
from checkers.wire import receive, send
from data import InputError

CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of one process
WORKERS = min(max(1, CORES), 64)
GRACE = 5.0  # seconds that a judge may take longer than its program


class SandboxError(InputError):
    """The sandbox does not work here. This is never a verdict on a program."""


GOOD = "import string\ndef f(x): return {x: (1, [2.5], string.digits)}"
ESCAPE = "def f():\n try: open('/proc/self/stat')\n except OSError: return False\n return True"
CHECKS = (  # of every new judge: program, test, should it pass? (The last needs seccomp.)
    (GOOD, "assert f('a') == {'a': (1, [2.5], '0123456789')}", True),
    (GOOD, "assert f('a') == {'a': [1, [2.5], '0123456789']}", False),
    (ESCAPE, "assert f()", False),
)


class Judge:
    """A judge's process; raises SandboxError if it fails the CHECKS."""

    def __init__(self):
        environment = {"PYTHONHASHSEED": "0"}  # so that sets of texts always have the same order
        environment |= {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        try:
            self.channel, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-s", "-S", "-B", "-m", "checkers.judge"],
                    cwd=Path(__file__).parent.parent,  # the folder of the package `checkers`
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise SandboxError(
                f"the sandbox cannot start here ({error}): "
                "use another machine or container for --task code"
            ) from error
        try:
            verdicts = [self.ask(program, [test], 60.0) for program, test, _ in CHECKS]
        except (EOFError, OSError) as error:
            verdicts = [[repr(error), ""]]
        passed, missing = [right for right, _ in verdicts], verdicts[0][1]
        expected = [right for _, _, right in CHECKS]
        if passed != expected and not (missing == "seccomp" and passed[:2] == expected[:2]):
            self.close()
            raise SandboxError(
                f"the sandbox does not work here (its checks gave {passed}, not {expected}): "
                "use another machine or container for --task code"
            )
        if missing:
            warn_once(missing)

    def ask(self, program: str, tests: list[str], timeout: float) -> list:
        """A judge.verdict; raises EOFError or OSError if the judge is gone or hangs."""
        self.channel.settimeout(WALL * timeout + GRACE)
        send(self.channel, [program, tests, timeout])
        return receive(self.channel)

    def close(self) -> None:
        """End the judge and all that it started."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@functools.cache
def warn_once(missing: str) -> None:
    free = "can reach this user's files, network and processes, also this one and the judge's"
    poor = "can import only the modules of judge.PRELOADED"
    print(
        f"sandbox: this system has no {missing}. A program "
        f"{free if missing == 'seccomp' else poor}: use a newer Linux, or a container on one",
        file=sys.stderr,
    )


IDLE: list[Judge] = []
os.register_at_fork(after_in_child=IDLE.clear)  # these judges serve the parent


@atexit.register
def close() -> None:
    """End all judges that are not at work; the next program starts new ones."""
    while IDLE:
        IDLE.pop().close()


def judged(program: str, tests: list[str], timeout: float) -> bool:
    """One verdict, from an idle judge or a new one.

    If that judge is gone before the time limit, another new one judges the program once more.
    """
    for fresh in (False, True):
        began = time.monotonic()
        try:
            judge = Judge() if fresh else IDLE.pop()
        except IndexError:
            judge = Judge()
        try:
            passed, fault = judge.ask(program, tests, timeout)
        except (EOFError, OSError):  # TimeoutError is an OSError
            judge.close()
            if time.monotonic() - began > timeout:
                return False
            continue
        IDLE.append(judge)
        if passed is None:
            raise SyntaxError(f"the tests are no Python: {fault}")
        return passed
    Judge().close()  # raises if the fault is not the program's
    return False


def run_many(jobs: list[tuple[str, list[str]]], timeout: float = 3.0) -> list[bool]:
    """Does each program pass all its tests in time?

    It has `timeout` seconds of CPU time, and WALL times that by the clock. jobs: (program, tests),
    of which WORKERS run at a time. Tests are sources that run one after the other in one namespace,
    such as MBPP's asserts, or HumanEval's check function and a call of it. Raises SandboxError if
    the sandbox gives no verdict, and SyntaxError if tests are no Python.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: judged(*job, timeout), jobs))
