"""The order in which examples are seen: reshuffled each epoch, the same on every rank, and exact after a resume."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from megatron_rlhf.config.errors import UserError

Item = TypeVar("Item")


class ShuffledBatches(Iterator[list[int]]):
    """An endless iterator of global batches: lists of indices into a sequence of `size` examples.

    The order of epoch e is a permutation seeded by (seed, e), or 0, 1, 2, ... without `shuffle`. An epoch's last batch
    may be smaller; with `whole` it is filled up from the next epoch, so that every batch has `batch_size` indices.
    Either way nothing is left out: after e epochs, each index has occurred e times.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool = True, whole: bool = False):
        assert size > 0, size
        assert batch_size > 0, batch_size
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.whole = whole
        self.epoch = 0
        """The epoch of the next index, which is also the number of epochs done."""
        self._seen = 0
        self._order = self._permutation()

    @property
    def batches_per_epoch(self) -> int:
        assert not self.whole, "whole batches do not end where epochs do"
        return -(-self.size // self.batch_size)

    def __next__(self) -> list[int]:
        batch = self.take(self.batch_size)
        while self.whole and len(batch) < self.batch_size:
            batch += self.take(self.batch_size - len(batch))
        return batch

    def take(self, count: int) -> list[int]:
        """The next `count` indices, or what is left of the epoch."""
        taken = self._order[self._seen : self._seen + count].tolist()
        self._seen += len(taken)
        if self._seen == self.size:
            self.epoch, self._seen = self.epoch + 1, 0
            self._order = self._permutation()
        return taken

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs to continue with the next batch: integers only."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from where `state` was taken. A new batch size may be set, other data or another seed may not.

        Raises:
            UserError: The state is of other data or another seed, whose order cannot be continued.
        """
        for name, now in (("size", self.size), ("seed", self.seed)):
            if state[name] != now:
                raise UserError(
                    f"the checkpoint's data order has {name} {state[name]}, this run {now}: "
                    "resume with the same data and seed, or start anew"
                )
        self.epoch, self._seen = state["epoch"], state["seen"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
