"""The process in which `sandbox` runs a program: a keeper that forks, for each test, a child without rights to much.

Nothing here is imported but the standard library and `keeper`.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import secrets
import sys
import tempfile
import types
from typing import Any

from megatron_rlhf.rewards.keeper import adopt_orphans, end_descendants, end_with_parent, wait_for

START = """
import sys
sys.path.insert(0, sys.argv[1])
from megatron_rlhf.rewards.cell import main
del sys.path[:2]
main()
"""
"""What a new Python runs, with the folder of the package as its argument; neither that nor the current folder is on the
program's path."""
PASSED = "passed"
NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
"""Of unshare(2)."""


def main() -> None:
    """Read a program and its tests, run them, write what became of each."""
    job = json.load(sys.stdin)
    adopt_orphans()
    outcomes: list[str] = []
    for test in job["tests"]:
        is_loaded, outcome = _attempt(job, test)
        if not is_loaded:  # the program fails by itself: each other test would end the same way
            outcomes += [outcome] * (len(job["tests"]) - len(outcomes))
            break
        outcomes.append(outcome)
    json.dump(outcomes, sys.stdout)


def _attempt(job: dict[str, Any], test: str) -> tuple[bool, str]:
    """Whether the program without the test ran to its end, and what became of both."""
    read, write = os.pipe()
    secret = secrets.token_hex()  # ending with exit code 0 is not passing
    folder = tempfile.mkdtemp()
    child = os.fork()
    if child == 0:
        try:
            _confine(job, folder, write)
            _run(job["program"], test, lambda *words: os.write(write, f"{json.dumps([secret, *words])}\n".encode()))
        finally:
            os._exit(1)
    os.close(write)
    status = wait_for(child, job["seconds"])
    end_descendants()
    os.set_blocking(read, False)
    reports = _reports(read, secret)
    os.close(read)
    if [PASSED] in reports:
        return True, PASSED
    is_loaded = ["loaded"] in reports
    raised = [words[1] for words in reports if words[0] == "raised"]
    if raised:
        return is_loaded, raised[0]
    if status is None:
        return is_loaded, f"not done within {job['seconds']:g} seconds"
    return is_loaded, f"ended its process (exit code {os.waitstatus_to_exitcode(status)})"


def _reports(read: int, secret: str) -> list[list[str]]:
    """What the child has said, and the program has not."""
    try:
        lines = os.read(read, 2**16).decode(errors="replace").splitlines()
    except BlockingIOError:  # something still holds the other end
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            words = json.loads(line)
            if isinstance(words, list) and words[:1] == [secret]:
                found.append(words[1:])
    return found


def _run(program: str, test: str, report: Any) -> None:
    """Both in one namespace, that of a module that is imported: code under `if __name__ == "__main__"` does not run."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile(program, "solution.py", "exec"), module.__dict__)
        report("loaded")
        exec(compile(test, "test.py", "exec"), module.__dict__)
        report(PASSED)
    except BaseException as error:  # SystemExit, too
        report("raised", f"{type(error).__name__}: {error}"[:200])


def _confine(job: dict[str, Any], folder: str, keep: int) -> None:
    """Before the program runs: limits that cannot be raised again, no network and other processes where that is allowed."""
    end_with_parent()
    os.setsid()
    is_apart = job["namespaces"] and _unshare()
    _be_child()  # where it is apart: the first process of the new namespace, with which all others in it end
    if is_apart:
        _be_child()  # an ordinary one
        _limit(resource.RLIMIT_NPROC, job["processes"])
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, 2**16)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, math.ceil(job["seconds"]) + 1)
    _limit(resource.RLIMIT_FSIZE, job["file_mb"] * 2**20)
    _limit(resource.RLIMIT_NOFILE, 256)
    _limit(resource.RLIMIT_AS, job["memory_mb"] * 2**20)


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _unshare() -> bool:
    """Leave the network and the other processes behind; False where the system does not allow it."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    apart = NEW_PID | NEW_NET | NEW_IPC
    if libc.unshare(NEW_USER | apart) == 0:
        with contextlib.suppress(OSError):  # the same names as outside; without them it is `nobody`
            for file, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{file}", "w", encoding="ascii") as opened:
                    opened.write(text)
        return True
    return libc.unshare(apart) == 0  # the system's administrator needs no new user


def _be_child() -> None:
    """Fork and go on in the child; the parent waits for it and ends with its exit code (of a signal, 128 more than it)."""
    child = os.fork()
    if child == 0:
        end_with_parent()
        return
    code = os.waitstatus_to_exitcode(wait_for(child) or 0)
    os._exit(code if code >= 0 else 128 - code)
