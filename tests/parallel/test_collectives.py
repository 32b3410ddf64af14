"""What ranks agree on over the whole world, by how many collectives."""

from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megatron_rlhf.checkpoint.integrity import NotWritten, agree
from megatron_rlhf.config.errors import Interrupted, UserError
from megatron_rlhf.parallel import collectives
from megatron_rlhf.runs import agreement

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object")


class Counted:
    """Counts torch's collectives while it is entered."""

    def __enter__(self) -> dict[str, int]:
        self.calls: dict[str, int] = {}
        self._saved = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", *OBJECTS)}
        for name, function in self._saved.items():
            setattr(dist, name, self._counting(name, function))
        return self.calls

    def _counting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self._saved.items():
            setattr(dist, name, function)


def figures_of_steps() -> list[tuple[dict[str, float], dict[str, int]]]:
    rank, largest, found = dist.get_rank(), collectives.Largest(), []
    for figures in (
        {"time/step_s": 1.0 + rank, "time/save_s": 9.0 - rank},
        {"time/step_s": -1.0 * rank},
        {f"memory/of_{rank}": 5.0} if rank else {},
        {"time/step_s": 3.0, f"memory/of_{rank}": float(rank)},
        {},
    ):
        with Counted() as calls:
            found.append((largest.of(figures), dict(calls)))
    return found


def test_the_largest_figures_take_one_reduction_once_their_names_are_known():
    known, new = {"all_reduce": 1}, {"all_reduce": 2, "all_gather_object": 1}
    assert (
        run_ranks(3, figures_of_steps)
        == [
            [
                ({"time/step_s": 3.0, "time/save_s": 9.0}, new),
                ({"time/step_s": 0.0}, known),
                ({"memory/of_1": 5.0, "memory/of_2": 5.0}, new),
                ({"time/step_s": 3.0, "memory/of_0": 0.0, "memory/of_1": 1.0, "memory/of_2": 2.0}, new),
                ({}, known),
            ]
        ]
        * 3
    )


def batches() -> tuple[dict[str, int], str]:
    with Counted() as calls:
        agreement.require_same_batch(4, [[1, 2], [3]])
    try:
        agreement.require_same_batch(5, [[1, 2], [3 + (dist.get_rank() == 1)]])
    except agreement.RanksDisagree as error:
        return calls, str(error)
    raise AssertionError("nothing was found")


def test_a_batch_that_all_have_takes_one_reduction():
    for calls, message in run_ranks(3, batches):
        assert calls == {"all_reduce": 1}
        assert "rank 1 on " in message and "rank 0 on " not in message and "rank 2 on " not in message
        assert "is at step 6 with batch" in message


def failures() -> tuple[list[tuple[int, str] | None], dict[str, int], str]:
    rank = dist.get_rank()
    with Counted() as calls:
        found = [collectives.first_message(None)]
        agree(None)
    found += [collectives.first_message(f"of {rank}" if rank else None), collectives.first_message(f"of {rank}")]
    try:
        agree(OSError("disk full") if rank == 2 else None)
    except NotWritten as error:
        return found, calls, str(error)
    raise AssertionError("nothing was found")


def test_a_message_of_any_rank_reaches_all_and_silence_takes_one_reduction():
    expected = [None, (1, "of 1"), (0, "of 0")], {"all_reduce": 2}, "disk full (rank 2)"
    assert run_ranks(3, failures) == [expected] * 3


def done_on_first_rank() -> list[Any]:
    calls: list[Any] = []

    def fail(error: Exception) -> None:
        raise error

    found = [collectives.on_first_rank(lambda: calls.append(dist.get_rank()) or len(calls)) for _ in range(3)]
    for error in (UserError("a mistake"), Interrupted("asked to stop")):
        with pytest.raises(type(error), match=str(error)):
            collectives.on_first_rank(lambda error=error: fail(error))  # type: ignore[misc]
    with pytest.raises(OSError, match="full"):
        collectives.on_first_rank(lambda: fail(OSError("full")), (OSError,))
    return [found, calls]


def test_one_rank_works_for_all_and_fails_for_all():
    assert run_ranks(3, done_on_first_rank) == [[[1, 2, 3], [0, 0, 0]], [[1, 2, 3], []], [[1, 2, 3], []]]
