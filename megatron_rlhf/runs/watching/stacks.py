"""Where each rank was when a job was ended: its Python stacks, and what NCCL recorded, in `run.dir/stacks/`."""

import contextlib
import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch

from megatron_rlhf.runs.watching.heartbeat import Beat

SIGNAL = signal.SIGRTMIN + 10
"""Makes a rank write its stack to a file of its own although it does not run Python code, as it hangs in a call."""
_SECONDS_TO_WRITE = 5.0
"""The file system may be what hangs."""
_SECONDS_TO_ANSWER = 0.5


class Stacks:
    """This rank's stack, and those of others on this host that cannot write theirs any more."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self._rank = folder, rank
        # Without a name: nothing is left of it, however this process ends.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        faulthandler.register(SIGNAL, file=self._file, all_threads=True)

    @property
    def descriptor(self) -> int:
        """For others: the open file with the answer to `SIGNAL`."""
        return self._file.fileno()

    def close(self) -> None:
        faulthandler.unregister(SIGNAL)
        self._file.close()

    def write(self) -> None:
        """This rank's own. It may be called from any thread."""
        _in_time(self._write)

    def _write(self) -> None:
        with self._open(self._rank).open("w") as file:
            file.write(f"rank {self._rank}, process {os.getpid()}, {datetime.now().isoformat(timespec='seconds')}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            record = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json")()  # noqa: B009 - only where NCCL is
            self._open(self._rank, "nccl.json").write_bytes(record if isinstance(record, bytes) else record.encode())

    def write_for(self, other: Beat) -> None:
        """That of a rank on this host that hangs; it is asked by a signal. Nothing if it is gone, or stopped."""
        with contextlib.suppress(OSError):
            os.kill(other.pid, SIGNAL)
            time.sleep(_SECONDS_TO_ANSWER)
            answer = Path(f"/proc/{other.pid}/fd/{other.stacks}").read_bytes()
            if answer:
                _in_time(
                    lambda: self._open(other.rank).write_bytes(
                        f"rank {other.rank}, asked by a signal\n".encode() + answer
                    )
                )

    def _open(self, rank: int, suffix: str = "txt") -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"rank_{rank}.{suffix}"


def _in_time(write: Callable[[], object]) -> None:
    def attempt() -> None:
        with contextlib.suppress(OSError):
            write()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_WRITE)
