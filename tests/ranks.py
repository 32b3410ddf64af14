"""Run a function on several ranks inside pytest: real processes, a real process group over gloo, bounded in time."""

import ctypes
import datetime
import faulthandler
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist

# Ranks are forked from a server that has imported the package once: a rank starts in milliseconds, not in seconds.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "megatron_rlhf.cli",
        "megatron_rlhf.trainers.setup.stages",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "torch.distributed.checkpoint",
    ]
)
DIE_WITH_PARENT = 1  # prctl(PR_SET_PDEATHSIG, ...)


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time. The message says which, and shows where."""


@dataclass
class _Rank:
    number: int
    process: Any
    results: connection.Connection
    stack_file: Path


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on each of `world_size` ranks of one process group; returns the results in order of ranks.

    Args:
        function: importable (top level of a module), and so is what it returns: both travel between processes.
        timeout: seconds for everything together.

    Raises:
        RankFailed: at the first rank that fails, with its traceback; the other ranks are then killed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        ranks = [_start(number, world_size, Path(folder), function, args, timeout) for number in range(world_size)]
        try:
            return _gather(ranks, time.monotonic() + timeout, timeout)
        finally:
            for rank in ranks:
                _kill(rank)


def limited_rank(rank: int, size: int) -> None:
    """From now on the system lets this rank's files grow to `size` bytes only: to the rank, its disk is full."""
    if dist.get_rank() == rank:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _start(
    number: int, world_size: int, folder: Path, function: Callable[..., Any], args: Sequence[Any], timeout: float
) -> _Rank:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    stack_file = folder / f"stack_{number}"
    process = CONTEXT.Process(
        target=_run_rank, args=(number, world_size, folder / "rendezvous", stack_file, sender, function, args, timeout)
    )
    process.start()
    sender.close()  # the rank's own copy is the last one: when the rank dies, we read an end of file
    return _Rank(number, process, receiver, stack_file)


def _gather(ranks: list[_Rank], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {rank.results: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankFailed(f"not finished after {timeout:g} s:\n" + "\n".join(map(_stack, waiting.values())))
        failures: list[tuple[bool, str]] = []
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                rank.process.join(5)
                failures.append((False, f"rank {rank.number} exited with code {rank.process.exitcode} and no result"))
                continue
            if succeeded:
                results[rank.number] = value
            else:
                failures.append((True, f"rank {rank.number} failed:\n{value}"))
        if failures:  # a rank that vanished comes first: its neighbours' errors only follow from that
            raise RankFailed("\n".join(message for _, message in sorted(failures)))
    return [results[rank.number] for rank in ranks]


def _stack(rank: _Rank) -> str:
    """The current stack of a rank."""
    os.kill(rank.process.pid, signal.SIGUSR2)
    for _ in range(20):
        if rank.stack_file.exists() and rank.stack_file.stat().st_size:
            break
        time.sleep(0.05)
    shown = rank.stack_file.read_text() if rank.stack_file.exists() else "not started"
    return f"rank {rank.number} is at\n{shown}"


def _kill(rank: _Rank) -> None:
    try:
        os.killpg(rank.process.pid, signal.SIGKILL)  # including helpers it may have started
    except ProcessLookupError:
        rank.process.kill()
    rank.process.join()
    rank.process.close()
    rank.results.close()


def _run_rank(
    number: int,
    world_size: int,
    rendezvous: Path,
    stack_file: Path,
    sender: connection.Connection,
    function: Callable[..., Any],
    args: Sequence[Any],
    timeout: float,
) -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    os.setpgrp()
    with stack_file.open("w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack)
        try:
            result = True, _in_world(number, world_size, rendezvous, function, args, timeout)
        except BaseException:
            result = False, traceback.format_exc()
        sender.send(result)
        sender.close()
        # A process group torn down by one rank breaks a neighbour's last collective: the parent ends all ranks.
        signal.pause()


def _in_world(
    number: int, world_size: int, rendezvous: Path, function: Callable[..., Any], args: Sequence[Any], timeout: float
) -> Any:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(number), WORLD_SIZE=str(world_size), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=number,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return function(*args)
