"""Where ranks leave their heartbeats: the rendezvous store, read in a way that costs little at thousands of ranks.

What is looked at all the time is a few bytes a rank. The first rank of each block of eight, a node's worth, puts its
block together, and the first rank of the world reads all blocks at once. Everything else about a rank is read only when
there is something to tell.
"""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rlhf.runs.watching.heartbeat import Beat, State

BLOCK = 8
"""Any number would be right: a rank that its block does not show is looked for itself."""
_STATES = list(State)
_ENTRY = np.dtype([("count", "<u4"), ("still_s", "<f4"), ("state", "u1")])


class Board:
    """The heartbeats of `size` ranks in a store of their own."""

    def __init__(self, store: Any, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        first = rank // BLOCK * BLOCK
        self._block = range(first, min(first + BLOCK, size)) if rank == first else range(0)
        self._is_complete = False
        """All ranks of this block have left a heartbeat."""
        if rank == 0:  # reading a key that does not exist would wait for it
            blocks = [range(i, min(i + BLOCK, size)) for i in range(0, size, BLOCK)]
            store.multi_set(
                [_of_block(i) for i in range(len(blocks))], [bytes(_ENTRY.itemsize * len(b)) for b in blocks]
            )

    def publish(self, beat: Beat) -> None:
        """Leave this rank's heartbeat, and this block's if it is this rank's task."""
        entry = np.array((beat.count % 2**32, beat.still_s, _STATES.index(beat.state)), _ENTRY)
        self._store.multi_set([_of_rank(self._rank), _about(self._rank)], [entry.tobytes(), beat.dump()])
        if not self._block:
            return
        keys = [_of_rank(rank) for rank in self._block]
        self._is_complete = self._is_complete or self._store.check(keys)
        if self._is_complete:
            self._store.set(_of_block(self._rank // BLOCK), b"".join(self._store.multi_get(keys)))

    def blocks(self) -> npt.NDArray[np.void]:
        """What blocks show of every rank: `count`, `still_s` and `state`; a count of 0 is a rank that was not heard of."""
        keys = [_of_block(i) for i in range(-(-self._size // BLOCK))]
        return np.frombuffer(b"".join(self._store.multi_get(keys)), _ENTRY)

    def count(self, rank: int) -> int:
        """The number of a rank's heartbeats, from the rank itself."""
        key = _of_rank(rank)
        return int(np.frombuffer(self._store.get(key), _ENTRY)["count"][0]) if self._store.check([key]) else 0

    def about(self, ranks: Iterable[int]) -> list[Beat]:
        """The last heartbeats of those that left any."""
        keys = [key for key in map(_about, ranks) if self._store.check([key])]
        return [Beat.load(text) for text in (self._store.multi_get(keys) if keys else ())]


class Heard:
    """How many heartbeats of each rank have arrived, and when the last one did, by this rank's clock."""

    def __init__(self, world_size: int):
        self._counts = np.zeros(world_size, np.int64)
        self._times = np.full(world_size, time.monotonic())
        self._looked = time.monotonic()

    def update(self, counts: npt.NDArray[np.integer]) -> None:
        """All ranks' counts. One that lags behind what was heard directly says nothing new."""
        self._times[counts > self._counts] = time.monotonic()
        np.maximum(self._counts, counts, out=self._counts)

    def update_one(self, rank: int, count: int) -> None:
        """The count of one rank."""
        if count > self._counts[rank]:
            self._counts[rank], self._times[rank] = count, time.monotonic()

    def silence(self, rank: int) -> float:
        return time.monotonic() - self._times[rank]

    def silent_for(self, seconds: float) -> list[int]:
        """Ranks not heard from for this long. A pause of this process (a suspended job) does not count."""
        now = time.monotonic()
        if now - self._looked > seconds / 2:
            self._times[:] = now
        self._looked = now
        return np.flatnonzero(now - self._times > seconds).tolist()


def states(entries: npt.NDArray[np.void]) -> set[State]:
    """Those that occur in entries of ranks that were heard of."""
    return {_STATES[i] for i in np.unique(entries["state"][entries["count"] > 0])}


def _of_rank(rank: int) -> str:
    return str(rank)


def _of_block(block: int) -> str:
    return f"block {block}"


def _about(rank: int) -> str:
    return f"about {rank}"
