"""How many communicators layouts make, counted on one rank of a simulated world; what a group of one rank does."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT, run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel.groups import communicators
from megatron_rlhf.parallel.layout import ParallelLayout

# A 175B policy, its critics, and the layout that samples, over the whole world.
ROLES = [
    ParallelConfig(tensor=8, pipeline=8),
    ParallelConfig(tensor=8, pipeline=4),
    ParallelConfig(tensor=8),
    ParallelConfig(tensor=8, pipeline=8),
]


class Simulated:
    """Counts what a rank of a large world asks torch for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: bool = False):
        self.made: list[list[int]] = []
        self.split: list[list[list[int]]] = []
        real = dist.new_group

        def new_group(ranks: list[int], **options: object) -> dist.ProcessGroup:
            assert options["use_local_synchronization"], "ranks outside the group would have to take part"
            self.made.append(ranks)
            return real(ranks, **options)

        def split_group(split_ranks: list[list[int]], timeout: None) -> dist.ProcessGroup | None:
            self.split.append(split_ranks)
            mine = next((ranks for ranks in split_ranks if dist.get_rank() in ranks), None)
            return None if mine is None else real(mine)

        monkeypatch.setattr(dist, "new_group", new_group)
        monkeypatch.setattr(dist, "split_group", split_group)
        monkeypatch.setattr(communicators, "_can_split", lambda world: splits)
        monkeypatch.setattr(communicators, "_timeout", lambda world: None)  # a simulated world has none


def start(rank: int, size: int) -> None:
    """A world in which this process is one rank and the others do not exist."""
    os.environ["WORLD_SIZE"] = str(size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def in_a_process_of_its_own(function: Callable[[int], None], size: int) -> None:
    """This process may be in a real world already, and a process is in one at a time."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as processes:
        processes.submit(function, size).result(timeout=200)


def make_groups(size: int) -> None:
    start(77, size)
    counted = Simulated(pytest.MonkeyPatch())
    policy = ParallelLayout.create(ROLES[0])
    one_role = len(counted.made)
    for config in ROLES[1:]:
        ParallelLayout.create(config)
    assert one_role <= 7
    assert len(counted.made) <= 13  # enumerating all groups took 858 calls of 512 ranks, 6,290 of 4,096
    assert [ranks for ranks in counted.made if len(ranks) == 1] == [[77]]
    assert len(set(map(tuple, counted.made))) == len(counted.made), "a group was made twice"
    assert all(77 in ranks and len(ranks) < size for ranks in counted.made)
    assert policy.groups.dp.size() == size // 64
    assert policy.groups.ep is policy.groups.cp


@pytest.mark.parametrize("size", [512, 4096])
def test_a_rank_makes_only_the_groups_it_is_in_and_none_of_one_rank_but_the_first(size):
    in_a_process_of_its_own(make_groups, size)


def split_groups(size: int) -> None:
    start(77, size)
    counted = Simulated(pytest.MonkeyPatch(), splits=True)
    for config in ROLES:
        ParallelLayout.create(config)
    assert [77] in counted.made
    assert len(counted.split) <= 12
    for enumeration in counted.split:  # all ranks of the world learn of all groups, of several ranks each
        together = sorted(rank for ranks in enumeration for rank in ranks)
        assert len(set(together)) == len(together) in (size, size // 4, size // 2)  # without the middle stages
        assert min(map(len, enumeration)) > 1


@pytest.mark.parametrize("size", [512, 4096])
def test_a_communicator_that_can_be_split_is_split_once_a_dimension(size):
    in_a_process_of_its_own(split_groups, size)


def test_only_what_exists_and_can_be_split_is_split():
    def world(device: object, supports: bool) -> SimpleNamespace:
        return SimpleNamespace(
            bound_device_id=device, _get_backend=lambda _: SimpleNamespace(supports_splitting=supports)
        )

    assert communicators._can_split(world("cuda:0", True))
    assert not communicators._can_split(world("cuda:0", False))
    assert not communicators._can_split(world(None, True))


def of_one_rank() -> tuple[int, int, Sequence[int]]:
    """Every collective over a group of this rank alone leaves what a real one would."""
    group = communicators.own_group([[0], [1]])
    assert group is not None
    x = torch.arange(4.0) + dist.get_rank()
    for collective in (
        lambda y: dist.all_reduce(y, group=group),
        lambda y: dist.broadcast(y, group_src=0, group=group),
        lambda y: dist.all_gather([y], x, group=group),
        lambda y: dist.all_gather_into_tensor(y, x, group=group),
        lambda y: dist.reduce_scatter_tensor(y, x, group=group),
        lambda y: dist.reduce_scatter(y, [x], group=group),
        lambda y: dist.all_to_all_single(y, x, group=group),
        lambda y: dist.gather(x, [y], group_dst=0, group=group),
        lambda y: dist.scatter(y, [x], group_src=0, group=group),
    ):
        in_place = collective.__code__.co_names[1] in ("all_reduce", "broadcast")
        y = x.clone() if in_place else torch.zeros(4)
        collective(y)
        assert torch.equal(y, x), collective.__code__.co_names
    objects: list[object] = [None]
    dist.all_gather_object(objects, "mine", group=group)
    assert objects == ["mine"]
    dist.barrier(group=group)
    return group.rank(), group.size(), dist.get_process_group_ranks(group)


def test_a_group_of_one_rank_does_what_a_real_one_does():
    assert run_ranks(2, of_one_rank) == [(0, 1, [0]), (0, 1, [1])]


def of_several_layouts() -> list[list[int]]:
    """Middle stages are in fewer groups than others; a layout afterwards brings them together with first and last stages."""
    stages = ParallelLayout.create(ParallelConfig(pipeline=4))
    parts = [ParallelLayout.create(ParallelConfig(tensor=2), ranks=range(2 * i, 2 * i + 2)) for i in range(2)]
    across = ParallelLayout.create(ParallelConfig(pipeline=2))
    found = []
    for group in (stages.groups.pp, parts[dist.get_rank() // 2].groups.tp, across.groups.dp, across.groups.pp):
        total = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(total, group=group)
        assert total == sum(1.0 + rank for rank in dist.get_process_group_ranks(group))
        found.append(dist.get_process_group_ranks(group))
    return found


def test_ranks_that_are_in_different_numbers_of_groups_meet_in_the_next_one():
    for rank, (pp, tp, dp, across) in enumerate(run_ranks(4, of_several_layouts, timeout=60)):
        assert pp == [0, 1, 2, 3]
        assert tp == ([0, 1], [2, 3])[rank // 2]
        assert dp == ([0, 1], [2, 3])[rank // 2]
        assert across == ([0, 2], [1, 3])[rank % 2]
