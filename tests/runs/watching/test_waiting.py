"""The rank that the others wait for is named."""

import logging
import time

import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_rlhf.parallel.collectives import Largest
from megatron_rlhf.runs.watching import waiting
from megatron_rlhf.runs.watching.waiting import Waiting


def steps(seconds: tuple[float, ...], count: int) -> tuple[list[dict[str, float]], list[str]]:
    """What is measured when each rank works for its time, then waits for the others; and what is logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    waiting.log.addHandler(handler)
    observed, rows = Waiting(), []
    observed.start()
    for _ in range(count):
        began = time.perf_counter()
        time.sleep(seconds[dist.get_rank()])
        dist.all_reduce(torch.zeros(1))
        figures = {"time/step_s": time.perf_counter() - began}
        reduced = Largest().of({**figures, **observed.figures(figures["time/step_s"])})
        rows.append(observed.metrics(reduced) | reduced)
    observed.stop()
    return rows, messages


def test_the_slowest_rank_is_the_one_that_does_not_wait() -> None:
    """A busy machine may hold the fast rank up for most of the slow one's second, and still."""
    (rows, messages), (others, silence) = run_ranks(2, steps, (0.0, 1.0), 6)
    assert rows == others
    for row in rows:
        assert row.keys() == {"time/step_s", "time/slowest_rank", "time/slowest_rank_work", "time/rank_spread"}
        assert row["time/slowest_rank"] == 1
        assert 0.9 < row["time/slowest_rank_work"] <= row["time/step_s"]
        assert 0 < row["time/rank_spread"] <= row["time/slowest_rank_work"]
    assert len(messages) == 1 and messages[0].startswith("rank 1 on ")
    assert silence == []


def test_equal_ranks_are_not_complained_of() -> None:
    (_, messages), _ = run_ranks(2, steps, (0.5, 0.5), 6)
    assert messages == []


def test_one_rank_waits_for_nobody() -> None:
    assert run_ranks(1, steps, (0.05,), 1)[0][0][0].keys() == {"time/step_s"}
