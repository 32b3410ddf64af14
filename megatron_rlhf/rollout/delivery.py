"""Finished responses on their way to the critic's ranks, while others are still being sampled.

Each replica of the sampler sends its own in portions, in the order in which they end. This order follows from the texts and
never from the clock, and a portion has a fixed number of responses: what is read together is the same in every run.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.sequences import SampledSequence
from megatron_rlhf.rollout.types import Completion

Portion = Mapping[int, Completion]
"""Row of the batch -> its response, in the order of rows."""


@dataclass
class Delivery:
    """From the sampler's ranks to the critic's, which are others."""

    sampler: ParallelLayout
    critic: ParallelLayout
    portions: int
    """About how many; fewer where they would leave ranks of the critic without work."""
    _sent: list[Callable[[], None]] = field(default_factory=list)

    def sender(self, shares: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], budget: Budget) -> "Sender":
        """Of this rank's replica, where replica i samples the rows `shares[i]` of the batch."""
        for wait in self._sent:  # of the last batch, which has long been received
            wait()
        self._sent.clear()
        layout, mine = self.sampler, shares[self.sampler.dp_rank]
        critic = self.critic.config
        smallest = (budget.sequences or 1) * self.critic.dp_size * critic.pipeline
        of_all = max(-(-len(prompts) // self.portions), smallest)
        send = self._send if layout.tp_rank == 0 and layout.is_first_stage else lambda rows: None
        return Sender([tuple(prompts[row]) for row in mine], mine, -(-of_all // layout.dp_size), send)

    def receive(self, shares: Sequence[Sequence[int]]) -> Iterator[Portion]:
        """On all ranks of the critic: portions of all replicas, until all have sent their rows."""
        replicas = range(self.sampler.dp_size)
        left = [len(share) for share in shares]
        while any(left):
            portion: dict[int, Completion] = {}
            for replica in replicas:
                if left[replica]:
                    sent = self._receive(replica)
                    left[replica] -= len(sent)
                    portion |= sent
            yield dict(sorted(portion.items()))

    def _send(self, portion: Portion) -> None:
        self._sent.append(collectives.post(portion, self.critic.ranks.start))

    def _receive(self, replica: int) -> Portion:
        is_first = dist.get_rank() == self.critic.ranks.start
        portion = collectives.receive(self.sampler.first_rank_of(replica)) if is_first else {}
        return collectives.share_object(portion, self.critic)


class Sender:
    """Collects the responses of a replica as they end. Those to one prompt stay together: they are read together."""

    def __init__(
        self,
        prompts: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        size: int,
        send: Callable[[Portion], None],
    ) -> None:
        """`rows`: of the batch, for each of the prompts."""
        self._rows, self._size, self._send = rows, size, send
        self._samples = Counter(prompts)
        self._ended: dict[tuple[int, ...], list[SampledSequence]] = {}
        self._ready: dict[int, Completion] = {}
        self._left = len(rows)

    def take(self, sequence: SampledSequence) -> None:
        """A response has ended."""
        prompt = tuple(sequence.prompt)
        ended = self._ended.setdefault(prompt, [])
        ended.append(sequence)
        if len(ended) == self._samples[prompt]:
            self._ready |= {self._rows[each.index]: each.completion() for each in ended}
            self._left -= len(ended)
            if len(self._ready) >= self._size or self._left == 0:
                self._send(self._ready)
                self._ready = {}
