"""Allows one job in a run folder at a time."""

import fcntl
import json
import logging
import os
import socket
import tempfile
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megatron_rlhf.config.errors import UserError

log = logging.getLogger(__name__)

NAME = ".lock"


class RunLock:
    """A lock of the operating system on a file in the run folder, held by the first rank.

    It is released when the process that holds it ends in any way: a killed job blocks nobody.
    """

    def __init__(self, folder: Path):
        """Take the lock, or say who holds it. Collective.

        Raises:
            UserError: on all ranks, if another job has the folder.
        """
        self._path = folder / NAME
        self._file: IO[str] | None = None
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            answer = [self._take()]
        dist.broadcast_object_list(answer)
        if answer[0] is not None:
            raise UserError(
                f"run.dir={folder} is in use by {answer[0]}: stop that job, or choose another folder (only if its node has "
                f"died, and the file system has not noticed: delete {self._path})"
            )

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _take(self) -> str | None:
        """None, or the holder."""
        file = self._path.open("a+")
        try:
            # Not flock: a forked process would hold that lock, too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                return _holder(file)
        except PermissionError:  # what some systems raise instead
            with file:
                return _holder(file)
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second job out of this folder", file.name, error)
        file.truncate(0)
        file.write(json.dumps(_ourselves()))
        file.flush()
        self._file = file
        return None


def _ourselves() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().isoformat(timespec="seconds"),
    }


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        who = json.loads(file.read())
        job = f"job {who['job']}, " if who["job"] else ""
        return f"{job}process {who['pid']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError):  # it has the lock and has not written its name yet
        return "another job"


def require_writable(folder: Path) -> None:
    """One rank tries, all ranks get the result: thousands trying at once would overload a shared file system."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = [error.strerror]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(f"run.dir={folder} cannot be written: {problem[0]}")
