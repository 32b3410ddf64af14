"""All ranks work on the same batch of the same step: checked before each step, by a checksum of the whole batch."""

import socket
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rlhf.config.errors import RunFailed
from megatron_rlhf.parallel import collectives


class RanksDisagree(RunFailed):
    """Ranks have different batches, or are at different steps: they would compute nonsense, or wait forever."""


def require_same_batch(step: int, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Compare step and token ids of the whole batch over the world. Collective: one reduction of four integers.

    Raises:
        RanksDisagree: on all ranks, naming those that differ from the majority.
    """
    mine = step, fingerprint(sequences)
    largest_n = torch.tensor([*mine, *(-number for number in mine)], device=collectives.device())
    dist.all_reduce(largest_n, op=dist.ReduceOp.MAX)
    *largest, minus_step, minus_batch = largest_n.tolist()
    if largest == [-minus_step, -minus_batch]:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, socket.gethostname()))
    usual = Counter(row for row, _ in gathered).most_common(1)[0][0]
    named = [
        f"rank {rank} on {host} is at step {row[0] + 1} with batch {row[1]:08x}"
        for rank, (row, host) in enumerate(gathered)
        if row != usual
    ]
    raise RanksDisagree(
        f"ranks went different ways: {'; '.join(named[:4])}; the others are at step {usual[0] + 1} with batch "
        f"{usual[1]:08x} (all_reduce before the step). Do all nodes see the same data files and configuration?"
    )


def fingerprint(sequences: Iterable[Sequence[int] | np.ndarray]) -> int:
    """A checksum of token ids, their order and the sequences' lengths."""
    total = 0
    for sequence in sequences:
        tokens = np.asarray(sequence, dtype=np.int64)
        total = zlib.crc32(tokens.tobytes(), zlib.crc32(len(tokens).to_bytes(8, "little"), total))
    return total
