"""Blocks of flattened tensors: they cover what they should, once, in order; equal ranks get equal bytes."""

import itertools
import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_rlhf.checkpoint.parts import Run, blocks, parts_of, runs_of, share


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (1, 3, 2)])
def test_blocks_are_the_elements_in_their_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        found = blocks(shape, start, stop)
        inside = [numbers[tuple(slice(o, o + s) for o, s in zip(*block, strict=True))].flatten() for block in found]
        assert torch.cat([numbers.new_zeros(0), *inside]).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


def test_blocks_by_hand():
    assert blocks((4, 10), 7, 33) == [((0, 7), (1, 3)), ((1, 0), (2, 10)), ((3, 0), (1, 3))]
    assert blocks((4, 10), 12, 15) == [((1, 2), (1, 3))]
    assert blocks((4, 10), 10, 30) == [((1, 0), (2, 10))]
    assert blocks((), 0, 1) == [((), ())]


def sharded(key: str, data: torch.Tensor, *offsets: tuple[int, int, int], **options: int) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, data, *offsets, **options)


def test_a_part_knows_its_place_in_the_whole_model():
    # The third layer of four, second of two tensor-parallel ranks: rows 2 and 3 of 4.
    placed = sharded("w", torch.arange(6.0).view(2, 3), (0, 2, 4), (1, 1, 2), prepend_axis_num=1)
    first, second = Run(placed, 1, torch.arange(1.0, 6.0)).parts()
    assert first.shape == second.shape == (4, 4, 3)
    assert (first.offsets, first.data.tolist()) == ((2, 2, 1), [[[1.0, 2.0]]])
    assert (second.offsets, second.data.tolist()) == ((2, 3, 0), [[[3.0, 4.0, 5.0]]])


def test_a_parameter_of_two_tensors_is_cut_between_them():
    """Gate and up projection are one parameter, and two places in the checkpoint."""

    def build(key, data, replica_id, flattened_range):
        gate, up = torch.chunk(data, 2)
        return [sharded(key, gate, (0, 0, 2)), sharded(key, up, (0, 1, 2))]

    parameter = torch.arange(12.0).view(4, 3)
    factory = ShardedTensorFactory("w", parameter, build, merge_fn=torch.cat)
    moments = torch.arange(4.0, 10.0) * 10
    gate, up = runs_of(factory, 4, moments)
    assert (gate.start, gate.data.tolist()) == (4, [40.0, 50.0])
    assert (up.start, up.data.tolist()) == (0, [60.0, 70.0, 80.0, 90.0])
    assert [part.offsets for part in parts_of([gate, up])] == [(1, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 64])
def test_equal_ranks_get_equal_bytes_and_leave_nothing_out(size):
    tensors = {"a": torch.zeros(67, 32), "b": torch.zeros(5), "c": torch.zeros(9, 31, dtype=torch.bfloat16)}
    runs = [Run(sharded(key, data), 0, data.flatten()) for key, data in tensors.items()]
    total = sum(data.nbytes for data in tensors.values())
    shares = [share(runs, rank, size) for rank in range(size)]
    for mine in shares:
        assert abs(sum(run.data.nbytes for run in mine) - total / size) <= 4
    for run in itertools.chain(*shares):
        run.data.add_(1)
    assert all((data == 1).all() for data in tensors.values())
