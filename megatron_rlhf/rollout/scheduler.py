"""Which sequences run next: waiting prompts take the slots of finished sequences."""

from collections import deque
from dataclasses import dataclass, field
from itertools import groupby, islice

from megatron_rlhf.rollout.sequences import SampledSequence

REFILL_SHARE = 8
"""New prompts are read when one in this many slots is free: a pass for every single one would cost as much as it gains."""

MOST_PADDING = 0.2
"""Share of a pass over prompts that may be padding to the longest of them, where that is more than `WORTH_A_PASS`."""
WORTH_A_PASS = 256
"""Tokens of padding that cost about as much as another pass."""


@dataclass(frozen=True)
class Step:
    """A forward pass that yields one token for each of its sequences, which are in consecutive slots."""

    sequences: list[SampledSequence]
    first_slot: int
    prefill: bool
    """The pass reads their prompts; otherwise their last tokens."""

    @property
    def slots(self) -> slice:
        return slice(self.first_slot, self.first_slot + len(self.sequences))


@dataclass
class Scheduler:
    """One batch of slots. Its sequences are always in the first ones, so that no pass computes an empty slot."""

    waiting: deque[SampledSequence]
    """Prompts that no batch has started; several batches may share them."""
    slots: int
    active: list[SampledSequence] = field(default_factory=list)
    """In slots 0, 1, ..."""

    def next(self) -> Step | None:
        """The next pass; None when there is nothing left to do."""
        free = self.slots - len(self.active)
        enough = min(len(self.waiting), max(self.slots // REFILL_SHARE, 1))
        if self.waiting and (not self.active or free >= enough):
            new = [self.waiting.popleft() for _ in range(self._alike(free))]
            self.active += new
            return Step(new, len(self.active) - len(new), prefill=True)
        return Step(list(self.active), 0, prefill=False) if self.active else None

    def _alike(self, most: int) -> int:
        """How many of the first waiting prompts are read together: one, or more that are about as long."""
        longest = tokens = rows = count = 0
        for prompt, same in groupby(islice(self.waiting, most), key=lambda sequence: tuple(sequence.prompt)):
            longest, tokens, rows = max(longest, len(prompt)), tokens + len(prompt), rows + 1
            if rows * longest - tokens > max(MOST_PADDING * rows * longest, WORTH_A_PASS):
                break
            count += len(list(same))  # samples of one prompt, which is read once
        return count

    def drop_finished(self) -> tuple[list[int], list[int]]:
        """Free the slots of finished sequences: (sources, targets) of the moves that close the gaps."""
        finished = [sequence.is_finished for sequence in self.active]
        left = len(self.active) - sum(finished)
        targets = [slot for slot in range(left) if finished[slot]]
        sources = [slot for slot in range(left, len(finished)) if not finished[slot]]
        for source, target in zip(sources, targets, strict=True):
            self.active[target] = self.active[source]
        del self.active[left:]
        return sources, targets
