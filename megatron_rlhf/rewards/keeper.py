"""No process outlives who asked for it: a keeper adopts what its descendants leave behind, daemons too, and ends them all.

Used by processes that run other people's code; nothing here is imported but the standard library.
"""

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""


def adopt_orphans() -> None:
    """From now on a descendant whose parent has ended is this process's child, in whatever session it is."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Kill this process when the thread that forked it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_descendants(within_s: float = 10.0) -> None:
    """Kill what this process has started, and what that has started, until nothing is left. After `adopt_orphans`."""
    deadline = time.monotonic() + within_s
    while _reap_any() and time.monotonic() < deadline:  # what forks meanwhile is found the next time
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def wait_for(child: int, seconds: float | None = None, line: int | None = None) -> int | None:
    """The child's status as of waitpid(2); None after this time, or when the other end of the socket `line` is closed."""
    deadline = None if seconds is None else time.monotonic() + seconds
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None), signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watched = select.poll()
    watched.register(woken, select.POLLIN)
    if line is not None:
        watched.register(line, 0)  # POLLHUP comes anyway
    try:
        while True:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    return ended[1]
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            for fd, _ in watched.poll(None if left is None else 1000 * left):
                if fd == line:
                    return None
                os.read(woken, 1024)
    finally:
        signal.signal(signal.SIGCHLD, before[0])
        signal.set_wakeup_fd(before[1])
        os.close(woken)
        os.close(wake)


def end_as(status: int | None) -> None:
    """End this process the way that the child with this status did."""
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError):  # of SIGKILL, which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _reap_any() -> bool:
    """Take note of children that have ended; False when there are none any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants() -> Iterator[int]:
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    known = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in known} - known:
        yield from found
        known |= found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")
