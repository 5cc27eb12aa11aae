"""What may a process do? Compute, and little else: seccomp and Landlock, by ctypes.

    read_only(folders)     from now on, files can be opened in these folders only, for reading
    confine(filter)        from now on, only the system calls of ALLOWED and CHECKED work

Neither can be undone, and both hold for threads, native code and root. A process can then open no
socket and no file for writing, and it can neither start nor signal a process: a system call that is
not listed fails with EPERM. It can start threads, and connect two sockets of its own, which asyncio
needs. This works on Linux on x86-64 and ARM64; elsewhere both return False. Next to read: wire.py.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import socket
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls on x86-64 and ARM64 (asm/unistd.h), None where a call does not exist.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "access": (21, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160),
    "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "epoll_create1": (291, 20), "getrandom": (318, 278),
    "statx": (332, 291), "rseq": (334, 293),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALL = 2**32 - 1
CHECKED = {  # numbers, and (i, mask, value): allowed if argument i & mask is value, for each
    "openat": ((257, 56), (2, WRITING, 0)),  # for reading; Landlock says which files
    "clone": ((56, 220), (0, ALL, 0x3D0F00)),  # a thread, as glibc makes it
    "fcntl": ((72, 25), (1, ALL - 3, 0)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL: no flags, no locks
    "ioctl": ((16, 29), (1, ALL, 0x5421)),  # FIONBIO: whether to block
    "socketpair": ((53, 199), (0, ALL, socket.AF_UNIX), (1, 15, socket.SOCK_STREAM)),
    "sendto": ((44, 206), (3, socket.MSG_OOB, 0)),
    "recvfrom": ((45, 207), (3, socket.MSG_OOB, 0)),
    "madvise": ((28, 233), (2, ALL - 31, 0)),
    "clock_gettime": ((228, 113), (0, ALL - 15, 0)),  # not the clock of another process
}
CLONE3 = 435  # fails as absent, so that glibc takes clone, whose flags a filter can check
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06  # instructions of BPF
KILL, DENY, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # what a filter returns; DENY is EPERM
ABSENT = 0x00050026  # ENOSYS
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # places in seccomp_data
PDEATHSIG, SECCOMP, NO_NEW_PRIVS = 1, 22, 38  # of prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8  # some of its rights


def system_call(function, *arguments) -> int:
    """What a function of LIBC returns; raises OSError if that is below 0."""
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, *values) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    system_call(LIBC.prctl, option, *arguments)


def limit(**limits: int) -> None:
    """Limit this process and its children; the names are those of the RLIMIT_ constants."""
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def die_with_parent() -> None:
    if sys.platform == "linux":
        prctl(PDEATHSIG, signal.SIGKILL)


def read_only(folders: list[str], hidden: str) -> bool:
    """From now on, only /dev/null and files in `folders` can be opened; False without Landlock.

    The files can be read only. A file or folder in `folders` whose name ends in `hidden` can be
    listed, but not read.
    """
    if sys.platform != "linux":
        return False
    try:
        version = system_call(LIBC.syscall, CREATE_RULESET, None, 0, 1)
        rights = struct.pack("Q", 2 ** min(12 + version, 15) - 1)  # all that this version knows
        rules = system_call(LIBC.syscall, CREATE_RULESET, rights, len(rights), 0)
        for folder in folders:
            allow(rules, READ_DIR, folder)
        for entry in [entry for folder in folders for entry in os.scandir(folder)]:
            if not entry.name.endswith(hidden):
                allow(rules, READ_FILE | READ_DIR * entry.is_dir(), entry.path)
        allow(rules, READ_FILE | WRITE_FILE, os.devnull)
        prctl(NO_NEW_PRIVS, 1)
        system_call(LIBC.syscall, RESTRICT_SELF, rules, 0)
        os.close(rules)
    except OSError:
        return False
    return True


def allow(rules: int, rights: int, path: str) -> None:
    """Add a rule of Landlock: these rights on a file, or on all beneath a folder."""
    file = os.open(path, os.O_PATH)
    system_call(LIBC.syscall, ADD_RULE, rules, 1, struct.pack("=Qi", rights, file), 0)
    os.close(file)


def seccomp_filter(reading: bool) -> bytes | None:
    """The allowed system calls as BPF, None on other systems; reading: allow openat, to read."""
    column, arch = ARCHITECTURES.get(platform.machine(), (None, None))
    if column is None or sys.platform != "linux":
        return None
    rows = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    rows += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]  # (.., skip if equal, skip if not, ..)
    for name, (numbers, *conditions) in CHECKED.items():
        if reading or name != "openat":
            left = 3 * len(conditions)  # rows up to the one that allows
            rows.append((EQUAL, 0, left + 2, numbers[column]))
            for argument, mask, value in conditions:
                left -= 3
                rows += [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (AND, 0, 0, mask)]
                rows.append((EQUAL, 0, left + 1, value))
            rows += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]
    numbers = [pair[column] for pair in ALLOWED.values() if pair[column] is not None]
    rows += [(EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    rows += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *row) for row in rows)


def confine(instructions: bytes | None) -> bool:
    """From now on, allow only the system calls of a `seccomp_filter`; False if that fails."""
    if instructions is None:
        return False
    rows = ctypes.create_string_buffer(instructions)
    header = struct.pack("HP", len(instructions) // 8, ctypes.addressof(rows))
    program = ctypes.create_string_buffer(header)
    try:
        prctl(NO_NEW_PRIVS, 1)
        prctl(SECCOMP, 2, ctypes.addressof(program))
    except OSError:
        return False
    return True
