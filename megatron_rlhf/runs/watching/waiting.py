"""Which rank the others wait for: the one that works longest, where working is not to wait for others.

Phases take equally long on all ranks, as each ends with a collective: what tells a straggler is how little it waits.
"""

import logging
import threading
import time
from collections.abc import Mapping

import torch.distributed as dist

from megatron_rlhf.config.launch import node_name
from megatron_rlhf.runs.watching.heartbeat import MainThread

log = logging.getLogger(__name__)

SECONDS_A_SAMPLE = 0.02
STRAGGLES_FROM, IN_A_ROW = 1.2, 5
"""A rank is named in the log when it works so much longer than the fastest in so many steps in a row."""
_TIME, _RANKS = 1e4, 2**20
"""Seconds and rank in one number that is exact in fp64, so that a maximum finds both."""


class Waiting:
    """Samples the main thread's stack: is it in a collective? On a GPU, only waiting by the host is seen."""

    def __init__(self) -> None:
        self._main = MainThread()
        self._waited = 0.0
        self._stop = threading.Event()
        self._in_a_row = 0
        self._last = -1
        self._names: dict[int, str] = {}
        self._thread = threading.Thread(target=self._sample, name="waiting", daemon=True)

    def start(self) -> None:
        """From the main thread."""
        if dist.get_world_size() > 1:
            _store().set(f"node of rank {dist.get_rank()}", node_name())
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def figures(self, step_s: float) -> dict[str, float]:
        """What this rank adds to a maximum over ranks: its seconds of work in a step, once with its number, once negative."""
        waited, self._waited = self._waited, 0.0
        if dist.get_world_size() == 1:
            return {}
        work = max(step_s - waited, 0.0)
        return {"slowest": int(work * _TIME) * _RANKS + dist.get_rank(), "fastest": -work}

    def metrics(self, largest: dict[str, float]) -> dict[str, float]:
        """Takes those maxima out of `largest`; names a straggler in the log."""
        if "slowest" not in largest:
            return {}
        units, rank = divmod(int(largest.pop("slowest")), _RANKS)
        slowest, fastest = units / _TIME, -largest.pop("fastest")
        self._note(rank, slowest, fastest, largest)
        return {
            "time/slowest_rank": float(rank),
            "time/slowest_rank_work": slowest,
            "time/rank_spread": max(slowest - fastest, 0.0),
        }

    def _note(self, rank: int, slowest: float, fastest: float, phases: Mapping[str, float]) -> None:
        straggles = slowest > STRAGGLES_FROM * fastest
        self._in_a_row = self._in_a_row + 1 if straggles and rank == self._last else int(straggles)
        self._last = rank
        if self._in_a_row == IN_A_ROW and dist.get_rank() == 0:
            node = _store().get(f"node of rank {rank}").decode()
            log.warning(
                "rank %d on %s keeps the others waiting, in %d steps in a row: it worked for %.3g s of this one's %.3g s, "
                "the fastest rank for %.3g s",
                rank,
                node,
                IN_A_ROW,
                slowest,
                phases.get("time/step_s", slowest),
                fastest,
            )

    def _sample(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(SECONDS_A_SAMPLE):
            now = time.monotonic()
            if self._main.waits():
                self._waited += now - last
            last = now


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
