"""Running code: untrusted Python against its tests. Its author is paid for whatever passes.

    trainer ── run_many ──▶ judge ── calls, over a socket ──▶ candidate, one for each program
                              └── forks, before any test ──▶ zygote ── forks ──▲

The judge evaluates the tests itself. Functions that they call are the program's: a call sends its
arguments to the candidate and gets back plain data (tagged JSON, never pickle). So a program sees
no expected value and no frame of a test, and has no say in what is equal. A judge is a new Python,
not a fork of the trainer, so that the trainer's size does not matter; it serves many programs. Its
zygote is forked before the first test is there, and has nothing to give away.

Covered on Linux (x86-64, ARM64), as root and as user: a candidate can compute, sleep, and read the
clock, the standard library and its socket (confine.py), in MEMORY bytes, until it is killed at the
time limit. It leaves nothing behind: no process, no file, no trace in the next program. A judge
that hangs or dies over what a program gave it is replaced.

Not covered: holes in the kernel or in Python's JSON, and load: a program may use its time and
memory. Elsewhere, such as on macOS, the verdict comes from the same judge, but the program can
reach files, network and processes of its user; that is said once, on stderr. A program that has
seen its tests, as MBPP shows them, can list their answers: no sandbox helps against that.

Arguments are copies: no test sees them changed. Next to read: rewards.py.
"""

import ast
import atexit
import builtins
import contextlib
import functools
import gc
import importlib
import os
import queue
import signal
import socket
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

from confine import confine, die_with_parent, limit, read_only, seccomp_filter
from wire import pack, receive, send, unpack

WORKERS = max(16, os.cpu_count() or 1)  # more than cores: an endless loop blocks one until its end
GRACE = 5.0  # seconds that a judge may take longer than its program
MEMORY, OPEN_FILES = 2**29, 32  # bytes, and file numbers, of a candidate and of a judge
LONGEST_REPLY = 2**22  # bytes
# Loaded in the zygote, to spare every program the time.
PRELOADED = (
    "abc array base64 bisect calendar cmath copy dataclasses difflib enum hashlib heapq inspect io "
    "itertools math numbers operator pprint random re secrets statistics string textwrap time "
    "traceback typing unicodedata"
)


class SandboxError(Exception):
    """The sandbox does not work here: never a verdict on a program."""


# --- 1. Candidate and zygote -------------------------------------------------------------------

VERBS = {"call": lambda f, args, kwargs: f(*args, **kwargs), "get": getattr, "set": setattr}


def candidate(channel: socket.socket, instructions: bytes | None) -> None:
    """Run a program and do what is asked of it, until the zygote ends this process."""
    module, objects = types.ModuleType("program"), []
    sys.modules["program"] = module

    def held(name):
        if isinstance(name, int):
            return objects[name]
        return vars(module)[name] if name in vars(module) else getattr(builtins, name)

    def hold(value) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(verb: str, name: str | int, *values):
        if verb == "run":
            return exec(compile(name, "program", "exec"), vars(module))
        return VERBS[verb](held(name), *(unpack(value, held) for value in values))

    send(channel, confine(instructions))
    while True:
        request = receive(channel)
        try:
            reply = [True, pack(answer(*request), hold)]
        except BaseException:  # SystemExit, for one
            reply = [False, None]
        send(channel, reply)


def zygote(control: socket.socket) -> None:
    """Fork a candidate for each socket that the judge sends, and end it when the judge says so."""
    die_with_parent()
    for name in PRELOADED.split():
        importlib.import_module(name)
    reading = read_only([folder for folder in sys.path if os.path.isdir(folder)])
    instructions = seccomp_filter(reading)
    gc.collect()
    gc.freeze()  # else a collection in a candidate copies what it shares with this process
    while sockets := socket.recv_fds(control, 1, 1)[1]:
        child = os.fork()
        if child == 0:
            die_with_parent()
            os.dup2(sockets[0], 3)
            os.closerange(4, OPEN_FILES)
            candidate(socket.socket(fileno=3), instructions)
        os.close(sockets[0])
        control.recv(1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        control.send(b".")


# --- 2. Judge ----------------------------------------------------------------------------------


class Remote:
    """A function or object of the program: what a test does to it happens in the candidate."""

    def __init__(self, ask, name: str | int):
        vars(self).update(_ask=ask, _name=name)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self._name, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("get", self._name, name)

    def __setattr__(self, name: str, value):
        self._ask("set", self._name, name, value)


def taken_names(tests: ast.Module) -> tuple[set[str], set[str]]:
    """Names that tests take from the program, and from the standard library.

    The tests alone decide that, so that no program can replace the abs of "abs(f(1.33)) < 1e-6". A
    builtin is the program's if no other name is, as in "sum(10, 15) == 25".
    """
    nodes = list(ast.walk(tests))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            defined.add(getattr(node, "asname", None) or node.name)
    free = {node.id for node in names} - defined
    owners = {getattr(node.value, "id", "") for node in nodes if isinstance(node, ast.Attribute)}
    modules = free & owners & sys.stdlib_module_names
    return free - modules - set(dir(builtins)) or free - modules, modules


def passes(candidate: socket.socket, program: str, tests: ast.Module) -> None:
    """Run a program in the candidate and the tests here; raises whatever goes wrong."""

    def name_of(value) -> str | int:  # what a test has beyond data is the program's or a builtin
        return vars(value)["_name"] if isinstance(value, Remote) else value.__name__

    def ask(verb: str, name: str | int, *values):
        send(candidate, [verb, name, *(pack(value, name_of) for value in values)])
        done, data = receive(candidate, LONGEST_REPLY)
        if done is not True:
            raise RuntimeError("the program failed")
        return unpack(data, functools.partial(Remote, ask))

    ask("run", program)
    taken, modules = taken_names(tests)
    space = {name: Remote(ask, name) for name in taken}
    space |= {name: importlib.import_module(name) for name in modules}
    exec(compile(tests, "tests", "exec"), space)


def verdict(control: socket.socket, program: str, tests: list[str], timeout: float):
    """[did it pass?, was it confined?] of one program."""
    tree = ast.parse("\n".join(tests))
    ours, theirs = socket.socketpair()
    socket.send_fds(control, [b"f"], [theirs.fileno()])
    theirs.close()
    confined, passed = receive(ours), False
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout)
            passes(ours, program, tree)
            passed = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException:  # also the alarm, where it comes just before it is switched off
        passed = False
    ours.close()
    control.send(b"k")
    if not control.recv(1):
        raise SandboxError("the zygote is gone")
    return [passed, confined]


def judge() -> None:
    """The main of a judge's process: serves the trainer, at stdin, until that is gone."""
    channel, nowhere = socket.socket(fileno=os.dup(0)), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    limit(MEMORY, OPEN_FILES)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        os.dup2(nowhere, 2)
        for file in (channel, ours):
            file.close()
        try:
            zygote(theirs)
        finally:
            os._exit(1)
    theirs.close()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
    warnings.simplefilter("ignore")  # of the tests' own escapes
    while True:
        try:
            request = receive(channel)
        except EOFError:
            return
        try:
            send(channel, verdict(ours, *request))
        except SyntaxError as error:
            send(channel, [None, str(error)])


# --- 3. Trainer --------------------------------------------------------------------------------

GOOD = "import string\ndef f(x): return {x: (1, [2.5], string.digits)}"
FREE = "def f():\n try: open('/proc/self/stat')\n except OSError: return False\n return True"
CHECKS = (  # of every new judge: program, test, does it pass (the last: if confined)?
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
            [sys.executable, "-s", "-S", "-B", __file__],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            env={**kept, "PYTHONHASHSEED": "0"},  # else sets of texts have another order each time
            start_new_session=True,
        )
        theirs.close()
        self.channel = ours
        for program, test, right in CHECKS:
            passed, confined = self.ask(program, [test], 60.0)
            if passed is not right and (confined or program is not FREE):
                self.close()
                raise SandboxError(f"the sandbox does not work here: it errs on {program!r}")
        if not confined:
            warn_once()

    def ask(self, program: str, tests: list[str], timeout: float) -> list[bool]:
        """`verdict`; EOFError or OSError if the judge is gone, TimeoutError if it hangs."""
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
def warn_once() -> None:
    print(
        "sandbox: this system cannot confine programs. Verdicts are as safe as elsewhere, but a "
        "program can reach this user's files, network and processes: use Linux, or a container",
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
    """Does a program pass all its tests within `timeout` seconds?

    tests: sources that are run one after the other in one namespace, such as MBPP's asserts, or
    HumanEval's check function and a call of it. Raises SandboxError where no verdict can be had,
    and SyntaxError for tests that are no Python.
    """
    return run_many([(program, tests)], timeout)[0]


def run_many(jobs: list[tuple[str, list[str]]], timeout: float = 3.0) -> list[bool]:
    """`run` of many (program, tests), WORKERS at a time, in their order."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: judged(*job, timeout), jobs))


if __name__ == "__main__":
    del sys.path[0]  # this folder: not for programs
    judge()
