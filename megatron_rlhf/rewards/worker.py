"""The process in which a reward function runs: it may print, fork, hang or crash without harm to the rank that asks.

Its parent is a keeper, which ends everything that the function has started, daemons too, when the function's process has ended
or the rank is gone.
"""

import contextlib
import os
import queue
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_rlhf.rewards.functions import Function, Mistake, find, load, numbers_of
from megatron_rlhf.rewards.keeper import adopt_orphans, end_as, end_descendants, end_with_parent, wait_for

START = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from megatron_rlhf.rewards.worker import keep
keep(sys.argv)
"""
"""What a new Python runs, with (number of the pipe, search path as JSON, the function's name) as arguments."""


def keep(arguments: Sequence[str]) -> None:
    """Serve in a child; when all is over, leave nothing behind and end as the child did."""
    adopt_orphans()
    child = os.fork()
    if child == 0:
        os.setsid()
        end_with_parent()
        serve(arguments)
        os._exit(0)
    status = wait_for(child, line=int(arguments[1]))
    end_descendants()
    end_as(status)


def serve(arguments: Sequence[str]) -> None:
    """Load the function, then answer each batch (prompts, responses, records, names) by its scores or by what was wrong."""
    os.set_inheritable(int(arguments[1]), False)
    pipe, spec = Connection(int(arguments[1])), arguments[3]
    batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, batches), daemon=True).start()
    try:
        function = load(spec)
    except Mistake as mistake:
        pipe.send((str(mistake), None))
        return
    except BaseException as error:  # whatever the user's file does when it is imported
        pipe.send((f"cannot be imported: {_raised(error, spec)}", None))
        return
    pipe.send((None, []))
    process = os.getpid()
    while True:
        answer = _answer(function, spec, *batches.get())
        if os.getpid() != process:  # a fork of the function's that came back: one answer is enough
            os._exit(0)
        pipe.send(answer)


def _answer(
    function: Function, spec: str, prompts: list[str], responses: list[str], records: list[dict], names: list[str]
) -> tuple[str | None, list[float]]:
    try:
        return None, numbers_of(function(prompts, responses, records), names)
    except Mistake as mistake:
        return str(mistake), []
    except BaseException as error:  # SystemExit, too, ends the run and not just this process
        return f"raised {_raised(error, spec)}", []


def _raised(error: BaseException, spec: str) -> str:
    """The exception in one line, with the last line of the user's file that it went through."""
    path = find(spec)[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if path and Path(frame.filename) == path]
    at = f" ({path}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.lineno:
        at = f" ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{at}"


def _read(pipe: Connection, batches: "queue.SimpleQueue[Any]") -> None:
    """Take in batches, until the rank is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            batches.put(pipe.recv())
