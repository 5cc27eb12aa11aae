"""The sandbox: right programs pass, wrong ones fail, and hostile ones neither pass nor do harm.

Each hostile test attacks one property; `check` also runs a right program afterwards.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path

import pytest

from checkers import confine, judge, sandbox, wire

SQUARE = "def f(x):\n    return x * x\n"
SQUARES = ["assert f(3) == 9", "assert f(5) == 25"]
SECONDS = 1.0  # of programs that never end
ROOT = Path(sandbox.__file__).parent.parent
SOURCES = ["data.py", *(f"checkers/{n}.py" for n in ("sandbox", "judge", "confine", "wire"))]


def run(program: str, tests: list[str], timeout: float = 3.0) -> bool:
    return sandbox.run_many([(program, tests)], timeout)[0]


def check(program: str, tests: list[str] | str = SQUARES, timeout: float = 20.0) -> bool:
    """The verdict on a program; a right program must pass after it, whatever the first one did."""
    tests = [tests] if isinstance(tests, str) else tests
    passed = run(textwrap.dedent(program), tests, timeout)
    assert run(SQUARE, SQUARES)
    return passed


def children(pid: int) -> set[int]:
    """All processes below a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found |= {int(path.parent.name)} | children(int(path.parent.name))
    return found


# --- Right and wrong ---------------------------------------------------------------------------


def test_a_right_program_passes_and_a_wrong_one_fails():
    assert check(SQUARE)
    assert not check("def f(x):\n    return x + x\n")
    assert not check("def g(x):\n    return x * x\n")
    assert not check("def f(x:\n")
    assert not check("")


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "0", "-7", "2**64", "-(2**3000)", "0.1", "float('inf')", "1e-300", "2+3j",
        "''", "'a\\u00e9\\U0001f600'", "'\\ud800'", "b'\\x00\\xff'", "[1, [2, (3,)]]", "(1, 'a')",
        "()", "{1, 2}", "frozenset({(1, 2)})", "{'a': {2: (3.5, None)}, (1, 2): []}",
        "range(1, 9, 2)",
        "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('0.10')",
        "__import__('collections').deque([1, 2])", "__import__('datetime').date(2024, 2, 29)",
        "__import__('datetime').datetime(2024, 2, 29, 23, 59, 58, 7)", "{'a': 1}.keys()",
        "{'a': [1]}.items()",
    ],
)  # fmt: skip
def test_a_value_comes_back_as_it_was(value):
    assert check(f"def f(): return {value}", f"assert f() == {value}")
    assert check("def f(x): return x", f"assert f({value}) == {value}")
    assert check("def f(x): return x", f"assert type(f({value})) is type({value})")


@pytest.mark.parametrize(
    ("returned", "expected"),
    [("[1]", "(1,)"), ("(1,)", "[1]"), ("'5'", "5"), ("5", "'5'"), ("{1}", "[1]"), ("None", "0")]
    + [
        ("{1: 3}.values()", "[3]"),
        ("0.1 + 0.2", "0.3"),
        ("[[1]]", "[1]"),
        ("b'a'", "'a'"),
        ("float('nan')", "float('nan')"),
    ],
)
def test_what_python_calls_unequal_is_unequal(returned, expected):
    assert not check(f"def f(): return {returned}", f"assert f() == {expected}")


def test_subclasses_and_iterators_are_compared_as_the_data_they_are():
    program = """
        from collections import Counter, OrderedDict, defaultdict, namedtuple
        from enum import IntEnum
        class Colour(IntEnum):
            RED = 1
        Point = namedtuple("Point", "x y")
        def f():
            dicts = [Counter("aab"), OrderedDict(a=1), defaultdict(int, b=2)]
            return [*dicts, Point(1, 2), Colour.RED]
        def g(): yield from (1, 2)
    """
    assert check(program, "assert f() == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, (1, 2), 1]")
    assert check(program, "assert list(g()) == [1, 2]")


def test_packing_is_undone_and_makes_plain_data_only():
    value = {"a": [(1, 2.5), {3}, frozenset({b"x"})], Fraction(1, 2): 2**70}
    assert wire.unpack(json.loads(json.dumps(wire.pack(value, None))), None) == value
    for data in (["os.system", ["true"]], ["eval", "1"], ["Fraction", ["1"], 2], ["list"]):
        with pytest.raises((KeyError, ValueError, TypeError)):
            wire.unpack(data, None)


def test_tests_use_objects_of_the_program_as_their_setup_does():
    program = """
        class Node:
            def __init__(self, value): self.value, self.left = value, None
            def depth(self): return 1 + (self.left.depth() if self.left else 0)
            def __len__(self): return 7
            def __iter__(self): return iter("ab")
        def height(node): return node.depth()
    """
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)"
    assert check(program, [setup, "assert height(root) == 3", "assert root.left.value == 2"])
    assert check(program, [setup, "assert len(root) == 7", "assert list(root) == ['a', 'b']"])
    assert not check(program, [setup, "assert height(root.left) == 3"])


def test_a_test_can_expect_an_exception_by_its_name():
    tests = "try:\n    f(-1)\n    assert False, 'no error'\nexcept ValueError:\n    pass"
    assert check("def f(x):\n    raise ValueError(x)", tests)
    assert not check("def f(x):\n    raise TypeError(x)", tests)
    assert not check("def f(x):\n    return x", tests)


def test_humanevals_check_with_loops_and_helpers_runs_as_it_stands():
    tests = [
        "def helper(x):\n    return x + 1\n",
        "def check(candidate):\n    import math\n    for n in range(30):\n"
        "        assert math.isclose(candidate(helper(n)), (n + 1) ** 2), 'wrong'\n",
        "check(f)",
    ]
    assert check(SQUARE, tests)
    assert not check("def f(x):\n    return 0 if x == 29 else x * x", tests)


def test_state_lasts_from_call_to_call_but_not_from_program_to_program():
    counter = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    for _ in range(2):
        assert check(counter, ["assert f() == 1", "assert f() == 2"])


@pytest.mark.parametrize(
    ("program", "test", "passes"),
    [
        ("def f(xs): xs.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", True),
        ("def f(xs): xs.sort()", "a = [3, 1, 2]\nf(xs=a)\nassert a == [1, 2, 3]", True),
        ("def f(d): d['x'] = {1: [2]}", "a = {}\nf(a)\nassert a == {'x': {1: [2]}}", True),
        ("def f(s): s.add((1, 2))", "a = {0}\nf(a)\nassert a == {0, (1, 2)}", True),
        ("def f(xs): xs.append(1); return xs", "a = []\nassert f(a) == [1] == a", True),
        ("def f(xs, ys): xs.extend(ys)", "a = b = [1]\nf(a, b)\nassert b == [1, 1]", True),
        ("def f(xs): pass", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", False),
        ("def f(xs): xs.clear()", "a = [1]\nf(a)\nassert a == [1]", False),
        (
            "def f(d): d['a'] = 1",
            "from collections import Counter as C\na = C()\nf(a)\nassert a == C('a')",
            True,
        ),
        ("class C: pass\ndef f(): return C()\ndef g(l): return len(l)",)
        + ("o = f()\na = [o]\nassert g(a) == 1 and a[0] is o", True),
        ("def f(x): return b'\\xff'.decode()",)
        + ("try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass", True),
        (
            "class E(list):\n    __eq__ = lambda *_: True\ndef f(xs): xs[0] = E()",
            "a = [0]\nf(a)\nassert a == [1]",
            False,
        ),
    ],
)
def test_lists_dicts_and_sets_become_what_a_program_makes_of_them(program, test, passes):
    assert run(program, [test]) == passes


def test_tests_that_are_no_python_are_an_error_and_never_a_verdict():
    with pytest.raises(SyntaxError, match="the tests are no Python"):
        run(SQUARE, ["assert f(3 == 9"])


def test_many_verdicts_come_in_the_order_of_the_programs():
    programs = [f"def f(x):\n    return x * {n}" for n in range(8)] * 8
    expected = [n == 3 for n in range(8)] * 8
    assert sandbox.run_many([(p, ["assert f(3) == 9"]) for p in programs]) == expected
    assert sandbox.run_many([]) == []


# --- Cheating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["object", "int", "str", "list", "float"])
def test_an_object_that_equals_everything_equals_nothing(base):
    assert not check(f"""
        class Liar({base}):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = None
            def __bool__(self): return True
        def f(x): return Liar()
    """)


@pytest.mark.parametrize("place", ["", "def f(x): "])
@pytest.mark.parametrize("end", ["raise SystemExit(0)", "import os; os._exit(0)", "exit()"])
def test_no_exit_status_is_a_pass(place, end):
    assert not check(place + end)


@pytest.mark.parametrize("error", ["Exception", "BaseException", ""])
@pytest.mark.parametrize(
    "end", ["import os; os._exit(0)", "import os; os.close(3)", "while 1: pass"]
)
def test_no_test_takes_the_end_of_a_program_for_an_exception(end, error):
    tests = f"try:\n    f(1)\nexcept {error}:\n    pass"
    assert not check(f"def f(x):\n    {end}", tests, SECONDS)


def test_walking_frames_and_objects_finds_no_expected_value():
    hunt = textwrap.dedent("""
        import gc, sys
        def f(x):
            frame, seen = sys._getframe(), []
            while frame:
                seen += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
                frame = frame.f_back
            seen += [repr(thing) for thing in gc.get_objects() if type(thing) in (tuple, dict)]
            return int("9182" + str(x)) if any("9182" + str(x) in text for text in seen) else None
    """)
    naive = [sys.executable, "-c", f"{hunt}\nexpected = 9182736\nassert f(736) == expected"]
    assert subprocess.run(naive, check=False).returncode == 0  # without the sandbox it succeeds
    assert not check(hunt, ["assert f(736) == 9182736"])


def test_patched_builtins_do_not_reach_the_judge():
    assert not check("""
        import builtins, json, operator
        builtins.abs = builtins.isinstance = json.dumps = lambda *_, **__: True
        class Yes(type):
            def __instancecheck__(self, other): return True
        builtins.AssertionError = Yes("Yes", (Exception,), {})
        def f(x): return 0
    """)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return 7\ndef abs(x): return 0", "assert abs(f(1.33) - 0.33) < 1e-6"),
        ("def f(x): return 7\nclass set:\n def __new__(c, x): return 1", "assert set(f(1)) == {1}"),
        ("def f(x): return 7\nclass math: isclose = max", "assert math.isclose(f(1), 0.5)"),
        ("def f(x): return 7\nclass sys: getsizeof = f", "assert f(()) == sys.getsizeof(())"),
    ],
)
def test_no_program_replaces_what_a_test_takes_from_python(program, tests):
    assert not check(program, tests)


def test_a_function_may_be_named_like_a_builtin():
    assert check("def sum(a, b): return a + b", "assert sum(10, 15) == 25")
    assert not check("def total(a, b): return a + b", "assert sum(10, 15) == 25")


def test_a_builtin_can_be_an_argument():
    assert check("def f(x, kind): return isinstance(x, kind)", "assert f(3, int) == True")


@pytest.mark.parametrize("where", ["", "def f(x):\n    "])
def test_forged_replies_pass_nothing(where):
    forge = (
        "import os; [os.write(3, len(m).to_bytes(8, 'big') + m) for m in "
        "(b'[true, null]', b'[true, true]', b'[true, 9]', b'true') * 5]"
    )
    assert not check(where + forge, ["assert f(3) == 8", "assert f(5) == 24"])


def test_a_swallowed_alarm_does_not_stop_the_clock():
    endless = """
        import signal
        def f(x):
            while True:
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_IGN)
                    while True: pass
                except BaseException: pass
    """
    began = time.monotonic()
    assert not check(endless, timeout=SECONDS)
    assert time.monotonic() - began < SECONDS + 10


@pytest.mark.parametrize("value", ["iter(int, 1)", "'a' * 2**23", "[0] * 2**22", "deep(5000)"])
def test_what_is_too_much_to_send_fails_at_once_or_in_time(value):
    deep = "def deep(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x\n"
    assert not check(f"{deep}def f(x): return {value}", timeout=SECONDS)


def test_a_reply_may_be_long_but_not_endless():
    assert check("def f(n): return 'a' * n", "assert len(f(2**22)) == 2**22")
    assert not check("def f(n): return 'a' * n", "assert len(f(2**25)) == 2**25")


# --- Harm --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "[os.fork() for _ in range(50)]",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 0)",
        "os.kill(VICTIM, 19)",
        "os.killpg(0, 0)",
        "signal.pidfd_send_signal(os.pidfd_open(VICTIM), 19)",
        "fcntl.fcntl(3, fcntl.F_SETOWN, VICTIM)",
        "fcntl.ioctl(3, 0x8901, struct.pack('i', VICTIM))",
        "fcntl.fcntl(1, fcntl.F_SETFL, os.O_APPEND)",
        "fcntl.lockf(1, fcntl.LOCK_EX)",
        "time.clock_gettime((~VICTIM << 3) | 2)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1))",
        "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
        "ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0 or 1 / 0",
        "socket.socket()",
        "socket.socketpair(type=socket.SOCK_DGRAM)",
        "tempfile.TemporaryFile()",
        "multiprocessing.Process(target=print).start()",
        "ThreadPoolExecutor(1).submit(os.fork).result()",
        "os.pipe()",
        "os.memfd_create('x')",
        "open(PLACE, 'w')",
        "open('/dev/shm/score-test', 'w')",
        "os.open(os.path.dirname(PLACE), os.O_TMPFILE | os.O_RDWR)",
        "os.mkdir(PLACE)",
        "os.symlink('/', PLACE)",
        "os.unlink(FILE)",
        "os.rename(FILE, PLACE)",
        "os.truncate(FILE, 0)",
        "os.chmod(FILE, 0)",
        "os.utime(FILE, (0, 0))",
        "open(FILE).read()",
        "os.listdir(os.path.dirname(FILE))",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "open('/proc/1/mem', 'rb')",
    ],
)
def test_a_program_cannot(action, tmp_path):
    file, place = tmp_path / "file", tmp_path / "place"
    file.write_text("kept")
    victim = subprocess.Popen(["sleep", "60"])
    before = file.stat()
    program = f"""
        import ctypes, fcntl, multiprocessing, os, resource, signal, socket, struct, subprocess
        import tempfile, time
        from concurrent.futures import ThreadPoolExecutor
        FILE, PLACE, VICTIM = {str(file)!r}, {str(place)!r}, {victim.pid}
        def f():
            {action}
            return "done"
    """
    try:
        assert not check(program, "assert f() == 'done'")
        state = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "S"
    finally:
        victim.kill()
        victim.wait()
    assert not place.exists() and not Path("/dev/shm/score-test").exists()
    after = file.stat()
    assert file.read_text() == "kept"
    assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize(
    "action",
    [
        "return [*ThreadPoolExecutor(3).map(abs, [-1, -2])] == [1, 2]",
        "return asyncio.run(asyncio.wait_for(asyncio.sleep(0.01, 5), 60)) == 5",
        "return bz2.decompress(bz2.compress(b'abc')) == b'abc'",
        "return lzma.decompress(lzma.compress(b'abc')) == b'abc'",
        "return [*sqlite3.connect(':memory:').execute('select 1 + 2')] == [(3,)]",
    ],
)
def test_a_program_can(action):
    for name in ("bz2", "lzma", "sqlite3"):
        pytest.importorskip(name)  # some Pythons are built without them
    program = f"""
        import asyncio, bz2, lzma, sqlite3
        from concurrent.futures import ThreadPoolExecutor
        def f(): {action}
    """
    assert check(program, "assert f()")


def test_threads_without_end_do_no_harm():
    assert check("""
        import threading, time
        def f(x):
            try:
                for _ in range(5000):
                    threading.Thread(target=time.sleep, args=(60,)).start()
            except RuntimeError:
                return x * x
    """)
    many = """
        import threading, time
        threading.stack_size(2**15)
        def f(count):
            for _ in range(count):
                threading.Thread(target=time.sleep, args=(60,)).start()
            time.sleep(0.5)
            return count
    """
    assert check(many, "assert f(50) == 50") and not check(many, "assert f(250) == 250")
    assert check(SQUARE)


def test_no_program_leaves_a_flag_to_the_next():
    store = """
        import os
        def f(x):
            blocked = os.get_blocking(1)
            try:
                os.set_blocking(1, False)
            except OSError:
                pass
            return blocked
    """
    assert all(run(textwrap.dedent(store), ["assert f(1)"]) for _ in range(3))


def test_what_a_program_cannot_do_does_not_end_it():
    assert check("""
        try:
            open("/tmp/score-test", "w")
        except OSError:
            pass
        def f(x): return x * x
    """)


def test_memory_is_limited():
    assert not check("def f(x): return len(bytearray(2**30))", "assert f(1) == 2**30")
    assert check("def f(x): return len(bytearray(2**27))", "assert f(1) == 2**27")


def test_output_goes_nowhere(capfd):
    assert check("""
        import os, sys
        print("noise" * 10**6)
        os.write(1, b"noise"); os.write(2, b"noise"); sys.stderr.write("noise")
        def f(x): return x * x
    """)
    assert capfd.readouterr() == ("", "")


def test_no_connection_reaches_a_listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not check(
            f"import socket\ndef f(): socket.create_connection(('127.0.0.1', {port})); return 1",
            "assert f() == 1",
        )
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_program_poisons_the_next_one():
    poison = """
        import builtins, json, math, random, re, sys, types
        builtins.len = lambda x: 99
        math.sqrt = json.dumps = re.match = random.random = sys.exit = None
        sys.modules["string"] = types.ModuleType("string")
        sys.setrecursionlimit(50)
        def f(x): return x * x
    """
    clean = "import math, string\ndef f(x): return [len(x), math.sqrt(4.0), string.digits[:2]]"
    for _ in range(sandbox.WORKERS):
        run(textwrap.dedent(poison), SQUARES)
        assert run(clean, ["assert f('abc') == [3, 2.0, '01']"])


def test_no_program_sees_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    sandbox.close()
    assert check("import os\ndef f(): return 'HF_TOKEN' in os.environ", "assert f() is False")


# --- The machinery -----------------------------------------------------------------------------


def test_nothing_is_left_of_a_thousand_programs():
    programs = [SQUARE, "import os\nos._exit(1)", "def f(x): return [x] * 999"] * 20
    jobs = [(program, SQUARES) for program in programs]
    sandbox.run_many(jobs)
    files, processes = len(os.listdir("/proc/self/fd")), children(os.getpid())
    for _ in range(16):
        assert sum(sandbox.run_many(jobs)) == 20
    assert len(os.listdir("/proc/self/fd")) == files
    assert children(os.getpid()) == processes
    sandbox.close()
    assert not children(os.getpid()) & processes


def test_right_programs_pass_however_many_there_are_and_beside_endless_loops():
    slow = "def f(x):\n    for _ in range(10**7): pass\n    return x * x"
    loop = "def f(x):\n    while True: pass"
    began = time.process_time()
    exec(slow, space := {})
    space["f"](3)
    limit = max(1.0, 3 * (time.process_time() - began))
    jobs = [(slow, SQUARES[:1]), (loop, SQUARES)] * 4 + [(slow, SQUARES[:1])] * 12
    assert sandbox.run_many(jobs, limit) == [True, False] * 4 + [True] * 12


def test_as_many_programs_run_at_a_time_as_there_are_cores(monkeypatch):
    running, most = [], []

    def judged(*job):
        running.append(job)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return True

    monkeypatch.setattr(sandbox, "judged", judged)
    assert all(sandbox.run_many([(SQUARE, SQUARES)] * 4 * sandbox.WORKERS))
    assert max(most) == sandbox.WORKERS == min(64, os.cpu_count())


def test_the_limit_is_of_cpu_time_and_a_program_that_sleeps_gets_a_multiple_of_it():
    for wait, least, most in (("while True: pass", 1, 2), ("__import__('time').sleep(60)", 4, 12)):
        began = time.monotonic()
        assert not run(f"def f(x):\n    {wait}", SQUARES, SECONDS)
        assert least * 0.9 < time.monotonic() - began < most + 10
    nap = "import time\ndef f(x):\n    time.sleep(1.3)\n    return x * x"
    assert run(nap, SQUARES[:1], SECONDS)


def run_changed(folder: Path, old: str, new: str, code: str):
    """Run code with a copy of the sandbox in which the text `old` is replaced by `new`."""
    sources = {name: (ROOT / name).read_text() for name in SOURCES}
    assert sum(old in text for text in sources.values()) == 1
    (folder / "checkers").mkdir()
    (folder / "checkers" / "__init__.py").touch()
    for name, text in sources.items():
        (folder / name).write_text(text.replace(old, new))
    code = f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom checkers import sandbox\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_an_endless_loop_ends_when_its_cpu_time_is_used_up(tmp_path):
    began = time.monotonic()
    code = f"print(sandbox.run_many([('while True: pass', {SQUARES!r})], 1.0)[0])"
    assert run_changed(tmp_path, "WALL = 4 ", "WALL = 60 ", code).stdout == "False\n"
    assert time.monotonic() - began < 40


def test_a_test_that_swallows_the_alarm_is_stopped_again(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE", 60)
    began = time.monotonic()
    forever = "import time\ndef f(x):\n    time.sleep(100)"
    assert not check(forever, "try:\n    f(1)\nexcept BaseException:\n    pass", SECONDS)
    assert time.monotonic() - began < 40


def test_a_test_that_swallows_the_alarm_passes_no_program_that_is_late():
    late = "import time\ndef f(x):\n    time.sleep(4.4)"
    assert not check(late, "try:\n    f(1)\nexcept BaseException:\n    pass", SECONDS)


def test_a_candidate_has_no_file_but_its_channel():
    program = """
        import os
        def f():
            found = []
            for file in range(3, 32):
                try: found.append(file) if os.fstat(file) else None
                except OSError: pass
            return found
    """
    assert check(program, "assert f() == [3]")


def test_packages_beside_the_standard_library_cannot_be_read(tmp_path):
    """They may hold a benchmark that is installed, with its answers."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from checkers import confine
print(confine.read_only([sys.argv[2]], hidden="-packages"))
for name in ("module.py", "package/inner.py", "site-packages/human_eval.py"):
    try:
        print(open(os.path.join(sys.argv[2], name)).read())
    except PermissionError:
        print("closed")
"""
    for name in ("module.py", "package/inner.py", "site-packages/human_eval.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("open")
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "open", "open", "closed"]


def test_no_program_reads_a_package_that_is_installed():
    files = list((Path(os.__file__).parent / "site-packages").rglob("*.py"))[:1]
    if not files:
        pytest.skip("no package beside the standard library")
    read = "def f(name):\n    return len(open(name).read())"
    assert not check(read, f"assert f({str(files[0])!r}) >= 0")
    assert check(read, f"assert f({os.__file__!r}) > 0")


def test_a_fork_of_the_trainer_leaves_its_judges_alone():
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from checkers import sandbox
jobs = [({SQUARE!r}, {SQUARES!r})] * 20
assert all(sandbox.run_many(jobs))
if os.fork() == 0:
    sys.exit(0 if all(sandbox.run_many(jobs)) else 1)
assert os.wait()[1] == 0
print(sum(sandbox.run_many(jobs)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "20\n", done.stderr


def test_signals_that_the_trainer_ignores_or_blocks_change_no_verdict():
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from checkers import sandbox
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
nap = "import time\\ndef f(x): time.sleep(60)"
print(*sandbox.run_many([({SQUARE!r}, {SQUARES!r})]), *sandbox.run_many([(nap, {SQUARES!r})], 0.5))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n", done.stderr


def test_a_dead_judge_is_replaced_and_its_program_judged_again():
    assert run(SQUARE, SQUARES)
    for idle in sandbox.IDLE:
        os.kill(idle.process.pid, signal.SIGKILL)
    assert sandbox.run_many([(SQUARE, SQUARES)] * 40) == [True] * 40


def test_a_judge_that_hangs_over_what_it_was_given_is_replaced(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    collide = "def f(x): return [i * (2**61 - 1) for i in range(60000)]"
    began = time.monotonic()
    assert not check(collide, "assert len(set(f(1))) == 0", SECONDS)
    assert time.monotonic() - began < 20


TRAINER = """
import sys
sys.path.insert(0, {root!r})
from checkers import sandbox
sandbox.run_many([("def f(x): return x", ["assert f(1) == 1"])])
print("ready", flush=True)
sandbox.run_many([("def f(x): return max(iter(int, 1))", ["f(1)"])] * 4, 2.0)
"""


def test_when_the_trainer_is_killed_all_of_the_sandbox_ends():
    code = TRAINER.format(root=str(ROOT))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.7)
    below = children(process.pid)
    assert len(below) >= 3 * min(4, sandbox.WORKERS)  # judge, zygote and candidate of each
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    while (alive := {p for p in below if Path(f"/proc/{p}").exists()}) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive and process.stderr.read() == ""  # orphans are quiet


def test_when_a_judge_is_killed_its_candidate_ends():
    code = TRAINER.format(root=str(ROOT)).replace("2.0", "30.0")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    judges = {pid for pid in children(process.pid) if os.getpgid(pid) == pid}
    below = children(process.pid) - judges
    process.kill()
    for pid in judges:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while (alive := {p for p in below if Path(f"/proc/{p}").exists()}) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(below) >= 2 * min(4, sandbox.WORKERS) and not alive


def test_a_sandbox_that_errs_is_an_exception_and_never_a_verdict(monkeypatch):
    sandbox.close()
    broken = [(sandbox.GOOD, "assert f('a') == 1", True), *sandbox.CHECKS[1:]]
    monkeypatch.setattr(sandbox, "CHECKS", broken)
    with pytest.raises(sandbox.SandboxError, match="does not work here"):
        run(SQUARE, SQUARES)


def test_a_judge_that_cannot_start_is_an_exception(monkeypatch):
    sandbox.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(sandbox.SandboxError, match="does not work here"):
        run(SQUARE, SQUARES)


@pytest.mark.parametrize(
    ("missing", "words"), [("seccomp", "files, network"), ("Landlock", "import")]
)
def test_a_system_that_cannot_confine_says_so_once_and_still_judges(missing, words, tmp_path):
    number = {"seccomp": ("1, 22, 38", "1, 99, 38"), "Landlock": ("= 444,", "= 9444,")}[missing]
    jobs = [(SQUARE, SQUARES), ("def f(x): return 1", SQUARES)] * 8
    done = run_changed(tmp_path, *number, f"print(sandbox.run_many({jobs!r}))")
    assert done.stdout == f"{[True, False] * 8}\n"
    assert done.stderr.count("sandbox: this system has no " + missing) == 1 and words in done.stderr


def test_the_numbers_of_the_system_calls_are_those_of_the_headers():
    headers = {
        0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        1: Path("/usr/include/asm-generic/unistd.h"),
    }
    for column, header in headers.items():
        if not header.exists():
            pytest.skip(f"{header} is not here")
        words = [line.split() for line in header.read_text().splitlines()]
        known = {w[1]: w[2] for w in words if len(w) == 3 and w[0] == "#define"}
        checked = {name: numbers for name, (numbers, *_) in confine.CHECKED.items()}
        for name, numbers in {**confine.ALLOWED, **checked}.items():
            if numbers[column] is not None:
                names = (f"__NR_{name}", f"__NR3264_{name.replace('newfstatat', 'fstatat')}")
                assert str(numbers[column]) in [known.get(each) for each in names], name


def test_names_that_tests_take_are_decided_by_the_tests_alone():
    def taken(source):
        return judge.taken_names(judge.ast.parse(source))

    assert taken("assert f(g(1)) == abs(2)") == ({"f", "g"}, set())
    assert taken("assert math.isclose(f(1), 2)") == ({"f"}, {"math"})
    assert taken("def check(candidate):\n    x = 1\n    assert candidate(x)\ncheck(f)") == (
        {"f"},
        set(),
    )
    assert taken("from random import choice\nassert f(choice([1]))") == ({"f"}, set())
    assert taken("assert sum(1, 2) == 3") == ({"sum"}, set())
