"""Megatron-Core's calls as a CPU answers them."""

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from ranks import run_ranks

ROUNDS, BUCKETS = 300, 30


def gather_many_buckets() -> list[float]:
    """As an optimizer's step does whose gathers overlap the next forward pass: all are under way, then all are waited for."""
    rank, size = dist.get_rank(), dist.get_world_size()
    buckets = [torch.zeros(2, 1500) for _ in range(BUCKETS)]
    for step in range(ROUNDS):
        handles = []
        for number, bucket in enumerate(buckets):
            bucket[rank] = step + number + rank
            with param_and_grad_buffer._coalescing_manager(dist.group.WORLD, async_ops=True) as handle:
                param_and_grad_buffer.dist_all_gather_func(
                    bucket.view(-1), bucket[rank], group=dist.group.WORLD, async_op=True
                )
            handles.append(handle)
            torch.randn(37 * number + 1).exp().sum()  # memory taken and given back meanwhile
        for handle in handles:
            handle.wait()
        for number, bucket in enumerate(buckets):
            assert all(bool((bucket[other] == step + number + other).all()) for other in range(size))
    return [float(bucket.sum()) for bucket in buckets]


def test_many_gathers_under_way_leave_the_heap_whole():
    """Gloo's own coalesced gathers end this within 3 to 238 rounds: a segmentation fault or an abort of malloc."""
    expected = [1500.0 * (2 * (ROUNDS - 1 + number) + 1) for number in range(BUCKETS)]
    assert run_ranks(2, gather_many_buckets, timeout=200) == [expected, expected]
