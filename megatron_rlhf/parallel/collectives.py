"""The few collectives that the algorithms need, on tensors and on plain Python objects."""

import itertools
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.config.errors import Interrupted, UserError
from megatron_rlhf.parallel.layout import ParallelLayout

T = TypeVar("T")
_POSTED = 1201
"""Tag of messages between two ranks; all other traffic between them has torch's, 0."""
_waits = itertools.count()


def device() -> torch.device:
    """The device on which this rank computes."""
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_first_rank(function: Callable[[], T], errors: tuple[type[Exception], ...] = (UserError, Interrupted)) -> T:
    """What one rank of the world does while the others wait, however long: all return what it returns, or raise its error, if
    that is one of `errors`. Collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except errors as error:
            outcome[1] = error
    wait_for_first_rank()
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def wait_for_first_rank() -> None:
    """Like a barrier, but a collective would end the run after half an hour, and hold up the handlers of signals."""
    number = next(_waits)
    if dist.get_world_size() == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"first rank {number}"
    if dist.get_rank() == 0:
        store.set(key, "done")
    pause_s = 0.001
    while dist.get_rank() > 0 and not store.check([key]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def sum_over(value: Tensor | float, group: dist.ProcessGroup) -> Tensor:
    """Sum of a number over a group, in fp64 so that it does not depend on how many ranks share it."""
    total = torch.as_tensor(value, dtype=torch.float64, device=device()).clone()
    dist.all_reduce(total, group=group)
    return total


def reduce_statistics(statistics: Sequence[Mapping[str, Tensor]], layout: ParallelLayout) -> dict[str, float]:
    """Statistics of all microbatches on all data-parallel ranks: names ending in `_max` or `_max_gap` by maximum, others by sum.

    Microbatch statistics live on the last pipeline stage; every rank of the layout gets the result. A data-parallel
    rank without work contributes zeros under the same names: ranks that differ in names would deadlock.
    """
    merged: dict[str, float] = {}
    named = [(name, value) for entry in statistics for name, value in entry.items()]
    # One transfer for all: on a GPU each separate float() would wait for everything before it.
    numbers = torch.stack([value.detach().double() for _, value in named]).tolist() if named else []
    for (name, _), number in zip(named, numbers, strict=True):
        if name.endswith(("_max", "_max_gap")):
            merged[name] = max(merged.get(name, -torch.inf), number)
        else:
            merged[name] = merged.get(name, 0.0) + number
    names = _from_last_stage(sorted(merged), layout)
    values = torch.tensor([merged.get(name, 0.0) for name in names], dtype=torch.float64, device=device())
    maxima = torch.tensor([name.endswith(("_max", "_max_gap")) for name in names], device=device())
    if layout.is_last_stage:
        largest = values.clone()
        dist.all_reduce(values, group=layout.groups.dp)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.groups.dp)
        values = torch.where(maxima, largest, values)
    values = from_last_stage(values, layout)
    return dict(zip(names, values.tolist(), strict=True))


def from_last_stage(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    """Broadcast a tensor, of a shape that all stages know, from the last pipeline stage to the others."""
    if layout.config.pipeline > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group_src=layout.config.pipeline - 1, group=layout.groups.pp)
    return tensor


def share_rows(rows: Tensor, layout: ParallelLayout) -> Tensor:
    """A batch whose rows the data-parallel ranks filled on their last stages, zero elsewhere -> the whole batch on every rank."""
    if layout.is_last_stage and layout.dp_size > 1:
        dist.all_reduce(rows, group=layout.groups.dp)
    return from_last_stage(rows, layout)


class Largest:
    """Each number's largest value over the ranks of the world; a rank may lack some.

    One small reduction: names are exchanged only when a rank has one that was not exchanged before.
    """

    def __init__(self) -> None:
        self._names: list[str] = []

    def of(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Collective over the world."""
        is_new = not figures.keys() <= set(self._names)
        numbers = [float(is_new), *(figures.get(name, -torch.inf) for name in self._names)]
        largest_n = torch.tensor(numbers, dtype=torch.float64, device=device())
        dist.all_reduce(largest_n, op=dist.ReduceOp.MAX)
        someone_has_new, *largest = largest_n.tolist()
        if not someone_has_new:
            return {name: value for name, value in zip(self._names, largest, strict=True) if value > -torch.inf}
        parts: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(parts, list(figures))
        self._names = list(dict.fromkeys(name for part in [self._names, *parts] for name in part))
        return self.of(figures)


def first_message(message: str | None) -> tuple[int, str] | None:
    """The lowest rank that has a message, and its message, on all ranks; None if no rank has one. Collective over the world."""
    nobody = dist.get_world_size()
    speaker_1 = torch.tensor([nobody if message is None else dist.get_rank()], device=device())
    dist.all_reduce(speaker_1, op=dist.ReduceOp.MIN)
    speaker = int(speaker_1)
    if speaker == nobody:
        return None
    box = [message]
    dist.broadcast_object_list(box, src=speaker)
    return speaker, str(box[0])


def gather_on_first_rank(value: T) -> list[T]:
    """The values of all ranks of the world on the first one; nothing on the others. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None)
    return gathered


def publish(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    """Sends what all ranks of a layout hold to ranks outside it, in place. Every rank of the world calls it."""
    if not layout.spans_world:
        dist.broadcast(tensor, src=layout.ranks.start)
    return tensor


def publish_object(value: T, layout: ParallelLayout) -> T:
    """The same for Python objects."""
    if layout.spans_world:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=layout.ranks.start)
    return box[0]


def _from_last_stage(names: list[str], layout: ParallelLayout) -> list[str]:
    if layout.config.pipeline == 1:
        return names
    box = [names]
    dist.broadcast_object_list(box, group_src=layout.config.pipeline - 1, group=layout.groups.pp)
    return box[0]


def gather_over_data(value: T, layout: ParallelLayout) -> list[T]:
    """A Python object of each data-parallel rank, in the order of ranks, on all of them."""
    parts: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(parts, value, group=layout.groups.dp)
    return parts


def post(value: object, rank: int) -> Callable[[], None]:
    """Begin to send a Python object to a rank, which takes it by `receive`; returns what waits until it has.

    It goes from host to host (gloo), on GPUs too: no kernel waits on a device for a rank that is not ready to receive.
    """
    body = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    parts = [torch.tensor([len(body)]), body]
    sent = [(part, dist.isend(part, dst=rank, tag=_POSTED)) for part in parts]

    def wait() -> None:
        for _, work in sent:
            if work is not None:
                work.wait()

    return wait


def receive(rank: int) -> Any:
    """The next object that a rank has posted for this one."""
    size = torch.zeros(1, dtype=torch.long)
    dist.recv(size, src=rank, tag=_POSTED)
    body = torch.zeros(int(size), dtype=torch.uint8)
    dist.recv(body, src=rank, tag=_POSTED)
    return pickle.loads(body.numpy().tobytes())


def share_object(value: T, layout: ParallelLayout) -> T:
    """What the first rank of a layout holds, on all ranks of the layout, which alone call it."""
    if len(layout.ranks) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=layout.every_group["intra_dist_opt"])
    return box[0]
