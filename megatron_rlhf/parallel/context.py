"""Context parallelism: the ranks of a group share each sequence.

A sequence of s tokens is cut into 2 n pieces, and rank r of n holds pieces r and 2 n - 1 - r: an early and a late one, so that
causal attention is the same amount of work on every rank. Megatron-Core splits its rotary positions in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local_tokens(length: int, group: dist.ProcessGroup) -> Tensor:
    """Positions in the whole sequence of this rank's tokens, [length / ranks]."""
    return _order(length, group.size()).view(group.size(), -1)[group.rank()]


def local_pieces(length: int, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """The same, as two pieces [start, stop)."""
    size, rank = length // (2 * group.size()), group.rank()
    return [(piece * size, (piece + 1) * size) for piece in (rank, 2 * group.size() - 1 - rank)]


def split(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of a tensor that all ranks have."""
    if group.size() == 1:
        return whole
    return whole.index_select(dim, local_tokens(whole.shape[dim], group).to(whole.device))


def gather(local: Tensor, dim: int, group: dist.ProcessGroup, sum_gradients: bool) -> Tensor:
    """The whole sequence, in order, from each rank's tokens.

    Args:
        sum_gradients: True if each rank uses the whole in its own way, so that the gradients must be summed; False if
            all ranks do the same with it, so that each already has the whole gradient.
    """
    return _Gather.apply(local, dim, group, sum_gradients) if group.size() > 1 else local


def _order(length: int, ranks: int) -> Tensor:
    """Positions in the order in which ranks hold them, one rank after the other."""
    assert length % (2 * ranks) == 0, f"{length} tokens do not divide over {ranks} ranks"
    pieces = torch.arange(length).view(2 * ranks, -1)
    return torch.stack([pieces[[rank, 2 * ranks - 1 - rank]] for rank in range(ranks)]).flatten()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: dist.ProcessGroup, sum_gradients: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.sum_gradients = dim, group, sum_gradients
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        back_in_order = _order(local.shape[dim] * group.size(), group.size()).argsort()
        return torch.cat(parts, dim).index_select(dim, back_in_order.to(local.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (whole,) = gradients
        if ctx.sum_gradients:
            whole = whole.contiguous()
            dist.all_reduce(whole, group=ctx.group)
        return split(whole, ctx.dim, ctx.group), None, None, None
