"""Communicators: as few as a layout needs. Each costs threads, sockets and NCCL buffers, and time that grows with the ranks.

A dimension of one rank needs none, one of all ranks is the world, and dimensions that put this rank among the same ranks,
also those of other roles' layouts, share theirs. For the others NCCL splits the world's communicator, all groups of a
dimension at once; elsewhere (gloo) a rank meets only the members of its own groups.
"""

import contextlib
import datetime
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import distributed_c10d

_ALONE = "alone"

Enumeration = tuple[tuple[int, ...], ...]


def own_group(enumeration: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """This rank's group among disjoint ones, None if it is in none of them. All ranks of the world call it, in one order."""
    return _shared(dist.group.WORLD, tuple(tuple(sorted(ranks)) for ranks in enumeration))


@functools.cache
def _shared(world: dist.ProcessGroup, enumeration: Enumeration) -> dist.ProcessGroup | None:
    mine = next((ranks for ranks in enumeration if dist.get_rank() in ranks), None)
    if all(len(ranks) == 1 for ranks in enumeration):
        return None if mine is None else _alone(world)
    if len(enumeration[0]) == dist.get_world_size():
        return world
    if _can_split(world):
        with _named((enumeration, mine)):
            return dist.split_group(split_ranks=[list(ranks) for ranks in enumeration], timeout=_timeout(world))
    return None if mine is None else _among(world, mine)


@functools.cache
def _among(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    with _named(ranks):
        return dist.new_group(list(ranks), timeout=_timeout(world), use_local_synchronization=True)


@functools.cache
def _alone(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Stands for every group of one rank. For one rank, torch's group that communicates with nobody does what a real one does."""
    if _ALONE not in dist.Backend.backend_list:
        dist.Backend.register_backend(_ALONE, _without_communicator, extended_api=True, devices=["cpu", "cuda"])
    with _named(dist.get_rank()):
        return dist.new_group([dist.get_rank()], backend=_ALONE, use_local_synchronization=True)


def _without_communicator(options: Any, _: Any) -> Any:
    create = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    return create(options.group_rank, options.group_size)


def _timeout(world: dist.ProcessGroup) -> datetime.timedelta:
    """torch gives groups half an hour, whatever the world has."""
    return world._get_backend(torch.device("cpu")).options._timeout


def _can_split(world: dist.ProcessGroup) -> bool:
    """Only a communicator that exists already, as one that is bound to a device does, can be split."""
    device = world.bound_device_id
    return device is not None and world._get_backend(device).supports_splitting


@contextlib.contextmanager
def _named(what: object) -> Iterator[None]:
    """A group that is made inside meets under a name of its own.

    torch's would count the groups that a rank is in, which differs among the members of one: a middle stage is not in the
    group of the embeddings. They would wait for each other under different names.
    """
    name = f"megatron_rlhf {hashlib.sha256(repr(what).encode()).hexdigest()}"
    original = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda ranks, use_hashed_name: name  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        distributed_c10d._process_group_name = original
