"""The judge's process: a program on one side of a socket, its tests on the other (see sandbox.py).

    judge      runs tests, and asks the candidate for what their functions return
    zygote     forked from the judge before any test arrives; forks and ends candidates
    candidate  runs one program, confined, and replies to the judge

sandbox.py starts this file as a module. Next to read: confine.py.
"""

import ast
import builtins
import contextlib
import gc
import importlib
import math
import operator
import os
import select
import signal
import socket
import sys
import time
import types
import warnings
from functools import partial, partialmethod

from checkers.confine import confine, die_with_parent, limit, read_only, seccomp_filter
from checkers.wire import pack, receive, send, unpack

MEMORY, OPEN_FILES = 2**29, 32  # limits of a candidate and of a judge: bytes, file numbers
WALL = 4  # limit by the clock, in limits of CPU time: a program may have to wait for others
LONGEST_REPLY = 2**24  # bytes
# The zygote imports these once, so that no program has to wait for them.
PRELOADED = (
    "abc array asyncio base64 bisect bz2 calendar cmath copy dataclasses difflib enum hashlib "
    "heapq inspect io itertools lzma math numbers operator pprint random re secrets sqlite3 "
    "statistics string textwrap threading time traceback typing unicodedata"
)

MOST_THREADS, WATCH = 100, 0.02  # of a candidate; seconds between two counts of them
CHANGEABLE = (list, dict, set)

# --- 1. Candidate and zygote -------------------------------------------------------------------

# What a test can do to an object of the program.
VERBS = {"call": lambda function, args, kwargs: function(*args, **kwargs), "getattr": getattr}
VERBS |= {"setattr": setattr, "getitem": operator.getitem, "iter": iter, "len": len, "bool": bool}


def candidate(instructions: bytes | None, missing: str) -> None:
    """Serve the requests that come at file 3, until the zygote ends this process."""
    channel = types.SimpleNamespace(recv=partial(os.read, 3), sendall=partial(os.write, 3))
    module, objects, numbers = types.ModuleType("program"), [], {}
    sys.modules["program"] = module

    def held(name):
        if isinstance(name, int):
            return objects[name]
        return vars(module)[name] if name in vars(module) else getattr(builtins, name)

    def hold(value) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    def answer(verb: str, name: str | int, *values) -> list:
        """The result, and [number, new value] of each argument that a call has changed."""
        if verb == "run":
            return [exec(compile(name, "program", "exec"), vars(module)), []]
        given = [unpack(value, held) for value in values]
        result = pack(VERBS[verb](held(name), *given), hold)
        if verb != "call":
            return [result, []]
        before = [*values[0][1], *(item for _, item in values[1][1])]
        after = enumerate([*given[0], *given[1].values()])
        after = [[at, pack(value, hold)] for at, value in after if type(value) in CHANGEABLE]
        return [result, [[at, new] for at, new in after if new != before[at]]]

    send(channel, missing if confine(instructions) else "seccomp")
    while True:
        request = receive(channel)
        try:
            reply = [True, *answer(*request)]
        except BaseException as error:  # such as SystemExit
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = [False, kinds[0]]
        send(channel, reply)


def zygote(control: socket.socket) -> None:
    """Fork a candidate for each socket that the judge sends, and end it when the judge says so."""
    die_with_parent()
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):  # some Pythons lack sqlite3 or lzma
            importlib.import_module(name)
    folders = [folder for folder in sys.path if os.path.isdir(folder)]
    reading = read_only(folders, hidden="-packages")
    instructions, missing = seccomp_filter(reading), "" if reading else "Landlock"
    gc.collect()
    gc.freeze()  # else a collection in a candidate copies what it shares with this process
    while sockets := (request := socket.recv_fds(control, 9, 1))[1]:
        child = os.fork()
        if child == 0:
            die_with_parent()
            os.dup2(sockets[0], 3)
            os.closerange(4, OPEN_FILES)
            # a file of its own: flags that it sets on a shared one would stay for the next program
            nowhere = os.open(os.devnull, os.O_RDWR)
            for file in (0, 1, 2):
                os.dup2(nowhere, file)
            os.close(nowhere)
            limit(CPU=int(request[0]), FSIZE=0, CORE=0, **({} if instructions else {"NPROC": 0}))
            candidate(instructions, missing)
        os.close(sockets[0])
        while not select.select([control], [], [], WATCH)[0]:
            if threads_of(child) > MOST_THREADS:
                os.kill(child, signal.SIGKILL)
        control.recv(1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        control.send(b".")


def threads_of(process: int) -> int:
    """How many threads a process has; 0 where /proc does not tell."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{process}/task").st_nlink - 2
    return 0


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
        return self._ask("getattr", self._name, name)


# Without eq and contains: they would send expected values to the candidate.
for verb in ("setattr", "getitem", "iter", "len", "bool"):
    method = partialmethod(lambda self, verb, *a: self._ask(verb, self._name, *a), verb)
    setattr(Remote, f"__{verb}__", method)


def taken_names(tests: ast.Module) -> tuple[set[str], set[str]]:
    """Names that tests take from the program, and modules that they take from Python.

    The tests alone decide that, so that no program can replace the abs of "abs(f(1.33)) < 1e-6". A
    builtin's name is taken from the program only if no other one is: "sum(10, 15) == 25".
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


def become(argument: list | dict | set, value) -> None:
    """Change an argument of a test as the program changed its copy."""
    if type(value) not in CHANGEABLE or not isinstance(argument, type(value)):
        raise TypeError("an argument has another type now")
    argument.clear()
    argument.extend(value) if isinstance(value, list) else argument.update(value)


def run_tests(candidate: socket.socket, program: str, tests: ast.Module) -> None:
    """Run a program in the candidate and the tests here; raises whatever goes wrong."""

    def name_of(value) -> str | int:  # an argument that is no data is the program's or a builtin
        return vars(value)["_name"] if isinstance(value, Remote) else value.__name__

    def ask(verb: str, name: str | int, *values):
        send(candidate, [verb, name, *(pack(value, name_of) for value in values)])
        done, data, *changed = receive(candidate, LONGEST_REPLY)
        if done is not True:  # the program raised: a test may expect that
            kind = vars(builtins).get(data)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise kind.__new__(kind) if known else RuntimeError("the program failed")
        held = partial(Remote, ask)
        arguments = [*values[0], *values[1].values()] if verb == "call" else []
        for at, new in changed[0]:
            become(arguments[at], unpack(new, held))
        return unpack(data, held)

    ask("run", program)
    taken, modules = taken_names(tests)
    space = {name: Remote(ask, name) for name in taken}
    space |= {name: importlib.import_module(name) for name in modules}
    exec(compile(tests, "tests", "exec"), space)
    ask("run", "")  # raises if the candidate has ended, which a test may have caught


def verdict(control: socket.socket, program: str, tests: list[str], timeout: float):
    """[did the program pass?, what this system lacks to confine it]."""
    tree, wall = ast.parse("\n".join(tests)), WALL * timeout
    ours, theirs = socket.socketpair()
    socket.send_fds(control, [b"%d" % math.ceil(timeout)], [theirs.fileno()])
    theirs.close()
    missing, passed, end = receive(ours), False, time.monotonic() + wall
    try:
        signal.setitimer(signal.ITIMER_PROF, wall + 1)  # ends this process in an endless C loop
        signal.setitimer(signal.ITIMER_REAL, wall, 1.0)  # again each second: a test may catch it
        run_tests(ours, program, tree)
        signal.setitimer(signal.ITIMER_REAL, 0)
        passed = time.monotonic() < end
    except BaseException:  # the alarm, too
        signal.setitimer(signal.ITIMER_REAL, 0)
    ours.close()
    control.send(b"k")
    if not control.recv(1):
        raise EOFError("the zygote is gone")
    return [passed, missing]


def judge() -> None:
    """The main function of a judge's process: serve the trainer, at stdin, until it is gone."""
    channel, nowhere = socket.socket(fileno=os.dup(0)), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    limit(AS=MEMORY, NOFILE=OPEN_FILES)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the trainer may ignore it: that is inherited
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
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
    warnings.simplefilter("ignore")  # tests may have odd escapes in their strings
    while True:
        try:
            request = receive(channel)
            try:
                reply = verdict(ours, *request)
            except (SyntaxError, TypeError, ValueError) as error:
                reply = [None, str(error)]
            send(channel, reply)
        except (EOFError, OSError):  # the trainer is gone, or the zygote
            return


if __name__ == "__main__":
    del sys.path[0]  # programs must not import this project
    judge()
