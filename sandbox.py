"""Running code: untrusted Python against its tests. Its author is paid for whatever passes.

    trainer ── run_many ──▶ judge ── calls, over a socket ──▶ candidate, one for each program
                              └── forks, before any test ──▶ zygote ── forks ──▲

The judge evaluates the tests itself. Functions that they call are the program's: a call sends its
arguments to the candidate and gets back plain data (tagged JSON, never pickle). So a program sees
no expected value and no frame of a test, and has no say in what is equal. A judge is a new Python,
not a fork of the trainer, so that the trainer's size does not matter; it serves many programs. Its
zygote is forked before the first test is there, and has nothing to give away.

Covered on Linux (x86-64, ARM64), as root and as user: a candidate can compute, sleep, and read the
clock, the standard library and its socket (confine.py), in half a GB, until it is killed at the
time limit. It leaves nothing behind: no process, no file, no trace in the next program. A judge
that hangs or dies over what a program gave it is replaced.

Not covered: holes in the kernel or in Python's JSON, and load: a program may use its time and
memory. Elsewhere, such as on macOS, the verdict comes from the same judge, but the program can
reach files, network and processes of its user; that is said once, on stderr. A program that has
seen its tests, as MBPP shows them, can list their answers: no sandbox helps against that.

Arguments are copies: no test sees them changed. The rest is in wire.py (the data), confine.py (what
a process may do) and judge.py (judge, zygote, candidate). Next to read: rewards.py.
"""

import atexit
import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wire import receive, send

# Of each process that torchrun starts; more than cores, since an endless loop blocks one to its end.
WORKERS = max(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
GRACE = 5.0  # seconds that a judge may take longer than its program


class SandboxError(Exception):
    """The sandbox does not work here: never a verdict on a program."""


GOOD = "import string\ndef f(x): return {x: (1, [2.5], string.digits)}"
FREE = "def f():\n try: open('/proc/self/stat')\n except OSError: return False\n return True"
CHECKS = (  # of every new judge: program, test, does it pass (the last with seccomp)?
    (GOOD, "assert f('a') == {'a': (1, [2.5], '0123456789')}", True),
    (GOOD, "assert f('a') == {'a': [1, [2.5], '0123456789']}", False),
    (FREE, "assert f()", False),
)


class Judge:
    """A judge's process; raises SandboxError if it errs on the CHECKS."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", str(Path(__file__).with_name("judge.py"))],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            env={**kept, "PYTHONHASHSEED": "0"},  # else sets of texts have another order each time
            start_new_session=True,
        )
        theirs.close()
        self.channel = ours
        try:
            verdicts = [self.ask(program, [test], 60.0) for program, test, _ in CHECKS]
        except (EOFError, OSError) as error:
            verdicts = [[repr(error), ""]]
        passed, missing = [right for right, _ in verdicts], verdicts[0][1]
        expected = [right for _, _, right in CHECKS]
        if passed != expected and not (missing == "seccomp" and passed[:2] == expected[:2]):
            self.close()
            raise SandboxError(f"the sandbox does not work here: {passed}, expected {expected}")
        if missing:
            warn_once(missing)

    def ask(self, program: str, tests: list[str], timeout: float) -> list:
        """judge.verdict; EOFError or OSError if the judge is gone, TimeoutError if it hangs."""
        self.channel.settimeout(timeout + GRACE)
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
    free = "can reach this user's files, network and processes"
    poor = "can import no more than judge.PRELOADED"
    print(
        f"sandbox: this system has no {missing}. Verdicts are as safe as elsewhere, but a program "
        f"{free if missing == 'seccomp' else poor}: use a newer Linux, or a container of one",
        file=sys.stderr,
    )


IDLE = queue.SimpleQueue()  # judges


@atexit.register
def close() -> None:
    """End all judges that are not at work; the next program starts new ones."""
    while not IDLE.empty():
        IDLE.get().close()


def judged(program: str, tests: list[str], timeout: float) -> bool:
    """One verdict, of an idle or a new judge; a second one where the first breaks down."""
    for _ in range(2):
        try:
            judge = IDLE.get_nowait()
        except queue.Empty:
            judge = Judge()
        try:
            passed, fault = judge.ask(program, tests, timeout)
        except TimeoutError:
            judge.close()
            return False
        except (EOFError, OSError):
            judge.close()
        else:
            IDLE.put(judge)
            if passed is None:
                raise SyntaxError(f"the tests are no Python: {fault}")
            return passed
    IDLE.put(Judge())  # raises if the fault is not the program's
    return False


def run(program: str, tests: list[str], timeout: float = 3.0) -> bool:
    """Does a program pass all its tests within `timeout` seconds of wall-clock time?

    tests: sources that are run one after the other in one namespace, such as MBPP's asserts, or
    HumanEval's check function and a call of it. Raises SandboxError where no verdict can be had,
    and SyntaxError for tests that are no Python.
    """
    return run_many([(program, tests)], timeout)[0]


def run_many(jobs: list[tuple[str, list[str]]], timeout: float = 3.0) -> list[bool]:
    """`run` of many (program, tests), WORKERS at a time, in their order."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: judged(*job, timeout), jobs))
