"""Running code: untrusted Python against its tests. Its author is paid for whatever passes.

    trainer ── run_many ──▶ judge ── calls, over a socket ──▶ candidate, one for each program
                              └── forks, before any test ──▶ zygote ── forks ──▲

The judge evaluates the tests itself. Functions that they call are the program's: a call sends its
arguments to the candidate and gets back plain data (tagged JSON, never pickle). So a program sees
no expected value and no frame of a test, and has no say in what is equal. A judge is a new Python,
not a fork of the trainer, so that the trainer's size does not matter; it serves many programs. Its
zygote is forked before the first test is there, and has nothing to give away.

Covered on Linux (x86-64, ARM64), as root and as user: a candidate can compute, sleep, start threads
and read the clock, the standard library and its socket (confine.py), in half a GB, until it is
killed at the time limit. It leaves nothing behind and writes no file, so tempfile is of no use. A
judge that a program makes hang or die is replaced. As many programs run at a time as there are
cores, so that a verdict does not depend on how many there are.

Not covered: holes in the kernel or in Python's JSON, and a file's time of access. Elsewhere, as on
macOS, the judge is as blind to lies, but a program can reach files, network and processes of its
user, the judge too; that is said once, on stderr. A program that has seen its tests, as MBPP shows
them, can list their answers. A call works on copies of its arguments; those that are lists, dicts
or sets become what it has made of them, by value.
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

CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's share
WORKERS = min(max(1, CORES), 64)
GRACE = 5.0  # seconds that a judge may take longer than its program


class SandboxError(InputError):
    """The sandbox does not work here: never a verdict on a program."""


GOOD = "import string\ndef f(x): return {x: (1, [2.5], string.digits)}"
ESCAPE = "def f():\n try: open('/proc/self/stat')\n except OSError: return False\n return True"
CHECKS = (  # of every new judge: program, test, does it pass (the last with seccomp)?
    (GOOD, "assert f('a') == {'a': (1, [2.5], '0123456789')}", True),
    (GOOD, "assert f('a') == {'a': [1, [2.5], '0123456789']}", False),
    (ESCAPE, "assert f()", False),
)


class Judge:
    """A judge's process; raises SandboxError if it errs on the CHECKS."""

    def __init__(self):
        environment = {"PYTHONHASHSEED": "0"}  # else sets of texts have another order each time
        environment |= {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        try:
            self.channel, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-s", "-S", "-B", "-m", "checkers.judge"],
                    cwd=Path(__file__).parent.parent,  # where it finds its neighbours
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise SandboxError(f"the sandbox cannot start here: {error}") from error
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
        """judge.verdict; EOFError or OSError if the judge is gone, TimeoutError if it hangs."""
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
    free = "can reach this user's files, network and processes, this one's and its judge's too"
    poor = "can import no more than judge.PRELOADED"
    print(
        f"sandbox: this system has no {missing}. A program "
        f"{free if missing == 'seccomp' else poor}: use a newer Linux, or a container of one",
        file=sys.stderr,
    )


IDLE: list[Judge] = []
os.register_at_fork(after_in_child=IDLE.clear)  # they serve the parent


@atexit.register
def close() -> None:
    """End all judges that are not at work; the next program starts new ones."""
    while IDLE:
        IDLE.pop().close()


def judged(program: str, tests: list[str], timeout: float) -> bool:
    """One verdict, of an idle judge or a new one; of another, new one if that is gone at once."""
    for fresh in (False, True):
        began = time.monotonic()
        try:
            judge = Judge() if fresh else IDLE.pop()
        except IndexError:
            judge = Judge()
        try:
            passed, fault = judge.ask(program, tests, timeout)
        except (EOFError, OSError):  # TimeoutError, for one
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
    """Does each program pass all tests in `timeout` seconds of CPU, WALL times that by the clock?

    jobs: (program, tests), of which WORKERS run at a time. Tests are sources that are run one after
    the other in one namespace, as MBPP's asserts, or HumanEval's check function and a call of it.
    Raises SandboxError where no verdict can be had, SyntaxError for tests that are no Python.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: judged(*job, timeout), jobs))
