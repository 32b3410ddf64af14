"""Ends a job in which a rank has died, hangs, or waits for something the others do not do, and says which rank.

A thread of each rank leaves a heartbeat in the rendezvous store (`board`). The first rank's thread reads all of them, the
others read the first's. The thread that finds something wrong reports it once and leaves the verdict in the store; every
thread that sees it ends its process, whatever the main thread is stuck in.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from megatron_rlhf.config.errors import Interrupted
from megatron_rlhf.config.launch import tell_launcher
from megatron_rlhf.runs.watching.board import Board, Heard, states
from megatron_rlhf.runs.watching.heartbeat import Beat, MainThread, Place, State, place_of, role_at_work
from megatron_rlhf.runs.watching.stacks import Stacks

log = logging.getLogger(__name__)

EXIT_CODE = 70
"""Exit code of every rank when the watchdog ends a job (EX_SOFTWARE)."""
LONGEST_INTERVAL = 2.0
LONGEST_SILENCE = 120.0
"""A heartbeat is never this late, whatever the main thread does. Python's GIL may delay it for a few seconds."""
_numbers = itertools.count()


class Phases(Protocol):
    """What the watchdog reads of a PhaseTimer."""

    @property
    def current(self) -> str: ...


class Watchdog:
    """`with Watchdog(timeout_s, folder) as watchdog:` around a run, on all ranks. 0 seconds: it does nothing.

    When it ends the job, each rank's stacks are left in the folder.
    """

    def __init__(self, timeout_s: float, folder: Path):
        self.timeout_s = timeout_s
        self._interval = min(max(timeout_s / 20, 0.1), LONGEST_INTERVAL)
        # Leaves time for a heartbeat to arrive, so that the job has ended when timeout_s is over.
        self._stuck_after = 0.8 * timeout_s
        self._silent_after = min(self._stuck_after, LONGEST_SILENCE)
        self._soon = max(4 * self._interval, 2.0)
        self._main = MainThread()
        self._stacks = Stacks(folder, dist.get_rank())
        self._beat = Beat(dist.get_rank(), stacks=self._stacks.descriptor)
        self._phases: Phases | None = None
        self._step: Callable[[], int] = lambda: 0
        self._roles: Sequence[str] = ()
        self._broken_at: Place | None = None
        self._first: Beat | None = None
        """The first rank's last heartbeat, on the others."""
        self._stop = threading.Event()
        self._answered = time.monotonic()
        """When the store last answered."""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # If the store's process is frozen, calls to it never return, whatever their timeout.
        self._waiter = threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True)

    def follow(self, phases: Phases, step: Callable[[], int], roles: Sequence[str]) -> None:
        """Where to read the phase and the number of steps done, and which roles are trained."""
        self._phases, self._step, self._roles = phases, step, roles

    def __enter__(self) -> "Watchdog":
        if self.timeout_s > 0:
            self._store = _own_store()
            self._board = Board(self._store, self._beat.rank, dist.get_world_size())
            self._heard = Heard(dist.get_world_size())
            self._answered = time.monotonic()
            self._thread.start()
            self._waiter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            self._stacks.close()
            return
        if error is None or isinstance(error, Interrupted):
            self._beat.state = State.ending
            dist.barrier()  # the store may end with the first rank
            self._stop.set()
            self._thread.join()
            self._waiter.join()
            self._stacks.close()
        elif is_broken_connection(error):
            # The message of this error names an address. The watchdog will soon know which rank is gone, and end this
            # process.
            self._broken_at = place_of(trace)
            self._beat.state = State.broken
            self._thread.join(self._silent_after + self._soon)
        else:
            self._beat.state = State.left
            self._stop.set()
            self._thread.join(self._soon)

    # --- everything below runs in the thread -------------------------------------------------------------------------

    def _watch(self) -> None:
        still_since = last = time.monotonic()
        while True:
            stopping = self._stop.is_set()
            now = time.monotonic()
            if now - last > 4 * self._interval:  # the whole process was suspended: that is not the main thread's fault
                still_since += now - last
            last = now
            if self._main.has_moved():
                still_since = now
            self._update(now - still_since)
            try:
                self._board.publish(self._beat)
                if stopping:
                    return
                self._end_if_told()
                self._judge()
                self._answered = time.monotonic()
            except (dist.DistError, RuntimeError) as error:  # the store is gone
                if not self._stop.wait(self._interval) and self._beat.state is not State.ending:
                    self._without_store(str(error).splitlines()[0])
                return
            self._stop.wait(self._interval)

    def _watch_store(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            if now - last > 4 * self._interval:  # suspended
                self._answered = now
            last = now
            if now - self._answered > self._silent_after:
                self._without_store(f"no answer for {now - self._answered:.0f} s")

    def _update(self, still_s: float) -> None:
        beat = self._beat
        beat.count += 1
        beat.still_s = still_s
        beat.place = self._broken_at or self._main.place()
        beat.step = self._step() + 1
        if self._phases is not None:
            beat.phase = self._phases.current
        beat.role = role_at_work(beat.phase, self._roles)

    def _judge(self) -> None:
        first = self._beat.rank == 0
        if first:
            entries = self._board.blocks()
            self._heard.update(entries["count"])
            stuck, found = float(entries["still_s"].max()), states(entries)
        else:
            stuck, found = 0.0, set()
            for beat in self._board.about([0]):
                self._first, found = beat, {beat.state}
                self._heard.update_one(0, beat.count)
        if State.left in found:
            time.sleep(self._soon)  # that rank reports why; the launcher may end this one first
            self._end_all(None, [])
        broken = State.broken in (self._beat.state, *found)
        silent = self._silent_for(self._soon if broken else self._silent_after)
        if silent:
            self._end_all(self._tell_silent(silent), silent)
        if stuck > self._stuck_after:
            self._end_all(tell_stuck(self._board.about(range(dist.get_world_size()))), [])

    def _silent_for(self, seconds: float) -> list[int]:
        """Of the ranks that this one listens to. The rank that puts a block together may be the one that is gone."""
        silent = [rank for rank in self._heard.silent_for(seconds) if self._beat.rank == 0 or rank == 0]
        for rank in silent:
            self._heard.update_one(rank, self._board.count(rank))
        return [rank for rank in silent if self._heard.silence(rank) > seconds]

    def _tell_silent(self, silent: Sequence[int]) -> str:
        parts = []
        for rank in silent:
            seconds = self._heard.silence(rank)
            last = "".join(f"; last seen: {beat.describe()}" for beat in self._board.about([rank]))
            parts.append(f"rank {rank} is dead or frozen: nothing was heard of it for {seconds:.0f} s{last}")
        return f"{'; '.join(parts)}. {self._beat.describe()}"

    def _end_all(self, message: str | None, kill: Sequence[int]) -> None:
        """Log the message, unless another rank has; leave the verdict for the others; end this process."""
        if message is not None:
            self._stacks.write()  # first: when others have left, this rank is no longer where it waited
        if self._store.add("verdicts", 1) == 1:
            if message is not None:
                self._say(message)
            victims = self._board.about(kill)
            self._store.set("verdict", json.dumps([victim.dump() for victim in victims]))
            self._kill(victims)
            time.sleep(2 * self._interval)  # the store may end with this process: let the others read it
        self._end(EXIT_CODE if message is not None else 1)

    def _end_if_told(self) -> None:
        if self._store.check(["verdict"]):
            self._stacks.write()
            self._kill([Beat.load(text) for text in json.loads(self._store.get("verdict"))])
            self._end(EXIT_CODE)

    def _kill(self, victims: Sequence[Beat]) -> None:
        """A frozen process on this host cannot end itself, and its launcher may wait for it."""
        for victim in victims:
            if victim.host == self._beat.host and victim.space == self._beat.space:
                self._stacks.write_for(victim)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(victim.pid, signal.SIGKILL)

    def _without_store(self, why: str) -> None:
        """The store lives in the first rank's process, or in torchrun."""
        self._stacks.write()
        if self._beat.rank <= 1:  # the others would say the same
            seen = f"; last seen: {self._first.describe()}" if self._first else ""
            self._say(
                f"rank 0, or the launcher, is dead or frozen: the rendezvous store is gone ({why}){seen}. {self._beat.describe()}"
            )
        if self._first:
            self._kill([self._first])
        self._end(EXIT_CODE)

    def _say(self, message: str) -> None:
        """Why the job ends."""
        text = f"watchdog: {message}. The job ends (watchdog.timeout_s={self.timeout_s:g})."
        log.critical(text)
        tell_launcher(text)

    def _end(self, code: int) -> None:
        logging.shutdown()
        os._exit(code)


def tell_stuck(beats: Sequence[Beat]) -> str:
    """Which ranks keep the others waiting: those outside any collective, else those in a different one from most."""
    places = Counter(beat.place.collective for beat in beats)
    outside = [beat for beat in beats if beat.place.collective is None]
    usual, _ = places.most_common(1)[0]
    elsewhere = [beat for beat in beats if beat.place.collective != usual]
    waiting = f"others have waited for {max(beat.still_s for beat in beats):.0f} s"
    if len(outside) < len(beats) and outside:
        guilty, why = outside, f"hangs outside of the collective in which {waiting}"
    elif elsewhere:
        guilty, why = elsewhere, f"went another way: {waiting} in {usual}"
    else:
        where = f"in {usual}" if usual else "outside of any collective"
        guilty, why = list(beats), f"all ranks have been {where} for {max(beat.still_s for beat in beats):.0f} s"
    rest = [beat for beat in beats if beat not in guilty]
    named = "; ".join(beat.describe() for beat in guilty[:4]) + (f"; and {len(guilty) - 4} more" if guilty[4:] else "")
    return f"{why}: {named}" + (f". {rest[0].describe()}" if rest else "")


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because a rank it needs has gone."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def _own_store() -> Any:
    """The world's store over a separate connection: the main thread may be stuck in a call on its own."""
    if dist.get_world_size() == 1:
        return dist.HashStore()
    default: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"watchdog {next(_numbers)}", default.clone())
