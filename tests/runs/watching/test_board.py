"""Heartbeats of thousands of ranks in one store: what the first rank does for them, counted and timed without processes."""

import time
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_rlhf.runs.watching.board import BLOCK, Board, Heard, states
from megatron_rlhf.runs.watching.heartbeat import Beat, State


class CountingStore:
    """A store that knows how often it was asked, and for how many keys."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            self.calls.append((name, len(first) if isinstance(first, list) else 1))
            return getattr(self._store, name)(first, *rest)

        return call


def world(store: Any, size: int) -> tuple[list[Board], list[Beat]]:
    return [Board(store, rank, size) for rank in range(size)], [Beat(rank, host="n", space="s") for rank in range(size)]


def pulse(boards: list[Board], beats: list[Beat], dead: tuple[int, ...] = ()) -> None:
    for board, beat in zip(boards, beats, strict=True):
        if beat.rank not in dead:
            beat.count += 1
            board.publish(beat)


@pytest.mark.parametrize("size", [1, 7, 8, 20])
def test_the_first_rank_reads_what_every_rank_wrote(size):
    boards, beats = world(dist.HashStore(), size)
    assert not boards[0].blocks()["count"].any()
    beats[size - 1].state = State.left
    beats[size // 2].still_s = 7.5
    for _ in range(2):
        pulse(boards, beats)
    entries = boards[0].blocks()
    assert entries["still_s"].tolist() == [7.5 if rank == size // 2 else 0.0 for rank in range(size)]
    assert states(entries) == {beat.state for beat in beats}
    # A block's first rank puts it together before the others' next beat.
    assert set(entries["count"].tolist()) <= {1, 2}
    assert [boards[0].count(rank) for rank in range(size)] == [2] * size
    assert boards[0].about(range(size)) == beats


def test_a_rank_that_never_came_is_not_waited_for():
    boards, beats = world(dist.HashStore(), 12)
    pulse(boards, beats, dead=(3, 8))
    assert not boards[0].blocks()["count"].any(), "no block is complete"
    assert [boards[0].count(rank) for rank in (2, 3, 8, 9)] == [1, 0, 0, 1]
    assert [beat.rank for beat in boards[0].about([2, 3, 8, 9])] == [2, 9]


def test_silence_is_of_the_rank_that_is_silent_not_of_its_block():
    boards, beats = world(dist.HashStore(), 16)
    heard = Heard(16)
    for _ in range(3):
        pulse(boards, beats)
    heard.update(boards[0].blocks()["count"])
    limit = 0.2
    end = time.monotonic() + 2 * limit
    while time.monotonic() < end:  # rank 8, which puts ranks 8 to 15 together, is gone
        pulse(boards, beats, dead=(8,))
        heard.update(boards[0].blocks()["count"])
        silent = heard.silent_for(limit)
        time.sleep(0.01)
    assert silent == list(range(8, 16))
    for rank in silent:
        heard.update_one(rank, boards[0].count(rank))
    assert heard.silent_for(limit) == [8]


def test_an_old_count_says_nothing_new():
    heard = Heard(2)
    heard.update(np.array([5, 5]))
    time.sleep(0.05)
    heard.update_one(1, 9)
    heard.update(np.array([5, 6]))  # a block that lags behind
    assert heard.silence(0) > 0.04 > heard.silence(1)


@pytest.mark.parametrize("size", [64, 512, 4096])
def test_requests_of_a_rank_do_not_grow_with_the_ranks(size):
    store = CountingStore()
    board = Board(store, 0, size)
    followers = [Board(store, rank, size) for rank in range(1, BLOCK)]
    pulse([*followers, board], [Beat(rank) for rank in range(1, BLOCK)] + [Beat(0)])
    last, ordinary = Board(store, size - BLOCK, size), Board(store, 1, size)
    for act, requests, keys in (
        (lambda: board.publish(Beat(0)), 3, 2 + BLOCK + 1),
        (board.blocks, 1, size // BLOCK),
        (lambda: last.publish(Beat(size - BLOCK)), 2, 2 + BLOCK),  # its block is not complete
        (lambda: ordinary.publish(Beat(1)), 1, 2),
        (lambda: ordinary.about([0]), 2, 2),
    ):
        store.calls.clear()
        act()
        assert (len(store.calls), sum(count for _, count in store.calls)) == (requests, keys)
