"""What a rank reads and writes of a model: blocks of whole tensors, however its memory is cut.

Data parallelism cuts flattened memory (Adam's moments, the weights of equal ranks) at any number, and a checkpoint holds
rectangular blocks of tensors that any layout can read. A run of a flattened tensor is at most three blocks of a matrix.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Span = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A block of a tensor of the whole model, and where it is in this rank's memory."""

    key: str
    shape: Span
    """Of the whole tensor."""
    offsets: Span
    data: Tensor
    """Shaped like the block."""
    may_be_cut: bool = False
    """Rows that pad the vocabulary may be more or fewer in a checkpoint."""


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a tensor that is this rank's part of the model."""

    placed: ShardedTensor
    """Where the tensor is in the whole model; its data are not used."""
    start: int
    """The first of the elements, in the flattened tensor."""
    data: Tensor
    """The elements, flat."""

    def part(self, start: int, stop: int) -> "Run":
        """Some of the run's elements."""
        return Run(self.placed, self.start + start, self.data[start:stop])

    def parts(self) -> Iterator[Part]:
        """The blocks that the run consists of, in its order."""
        placed, position = self.placed, 0
        ones = (1,) * placed.prepend_axis_num
        zero = (0,) * placed.prepend_axis_num
        for offsets, sizes in blocks(tuple(placed.local_shape), self.start, self.start + len(self.data)):
            place = tuple(a + b for a, b in zip(placed.global_offset, zero + offsets, strict=True))
            data = self.data[position : position + math.prod(sizes)].view(ones + sizes)
            yield Part(placed.key, tuple(placed.global_shape), place, data, placed.allow_shape_mismatch)
            position += math.prod(sizes)


def blocks(shape: Span, start: int, stop: int) -> list[tuple[Span, Span]]:
    """(offsets, sizes) of the blocks that hold elements [start, stop) of a flattened tensor, in their order."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        return [((last, *o), (1, *s)) for o, s in blocks(shape[1:], start - last * row, stop - last * row)]
    before = blocks(shape[1:], start - (first - 1) * row, row) if start % row else []
    whole = [((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))] if last > first else []
    after = blocks(shape[1:], 0, stop - last * row)
    return [
        *(((first - 1, *o), (1, *s)) for o, s in before),
        *whole,
        *(((last, *o), (1, *s)) for o, s in after),
    ]


def runs_of(entry: ShardedTensor | ShardedTensorFactory, start: int, data: Tensor) -> Iterator[Run]:
    """Elements [start, start + len(data)) of a parameter whose place is `entry`: several runs where it is several tensors.

    Args:
        data: flat; the parameter's own values or what belongs to them, such as a moment.
    """
    for placed, first in _tensors_in(entry):
        low, high = max(first, start), min(first + math.prod(placed.local_shape), start + len(data))
        if low < high:
            yield Run(placed, low - first, data[low - start : high - start])


def _tensors_in(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is made of (gate and up projection are two), and where they begin in it."""
    if isinstance(entry, ShardedTensor):
        yield entry, 0
        return
    for tensor in nested_values([entry.build()]):
        yield tensor, (tensor.data.data_ptr() - entry.data.data_ptr()) // entry.data.element_size()


def share(runs: Iterable[Run], rank: int, size: int) -> list[Run]:
    """What rank `rank` of `size` equal ones handles: an equal piece, in bytes, of all runs laid end to end."""
    runs = list(runs)
    total = sum(run.data.nbytes for run in runs)
    low, high = (total * i // size for i in (rank, rank + 1))
    mine, begin = [], 0
    for run in runs:
        width, count = run.data.element_size(), len(run.data)
        first, last = (min(max(-(-(edge - begin) // width), 0), count) for edge in (low, high))
        if first < last:
            mine.append(run.part(first, last))
        begin += run.data.nbytes
    return mine


def parts_of(runs: Sequence[Run]) -> list[Part]:
    """The blocks of all runs."""
    return [part for run in runs for part in run.parts()]
