"""Stopping between two steps when the cluster asks for it: a signal leads to a checkpoint and an exit code."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhf.config.errors import Interrupted
from megatron_rlhf.parallel import collectives

log = logging.getLogger(__name__)

# Slurm sends SIGTERM before a requeue, a preemption or the time limit; slurm/common.sh asks for SIGUSR1 earlier still.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes a signal, and lets all ranks agree on the step after which they stop."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on the signals are noted instead of ending the process."""
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread set handlers
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def ignore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def leave_if_asked(self, while_what: str) -> None:
        """Before a run's first step, on one rank, where there is nothing to save. Raises Interrupted."""
        if self._asked:
            raise Interrupted(f"asked to stop while {while_what}: the run had not begun, and nothing is kept")

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: signals reach ranks at different times, all agree."""
        asked = torch.tensor(int(self._asked), device=collectives.device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
