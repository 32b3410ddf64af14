"""Contenders in turn: machines are noisy, ratios are less so."""

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_rlhf.parallel import runtime

PACKAGES = ("torch", "megatron-core", "transformers")


def sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options that are whole numbers, by name and default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's rounds, run in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class InAnotherProcess:
    """What `make(*arguments)` returns, called in a process of its own, where nothing is set as ours sets it."""

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        processes = torch.multiprocessing.get_context("spawn")
        self._pipe, there = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()  # so that its end is heard of
        self._pipe.recv()

    def __call__(self) -> Any:
        self._pipe.send(None)
        return self._pipe.recv()


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    function = make(*arguments)
    pipe.send(None)
    while _is_called(pipe):
        pipe.send(function())


def _is_called(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:  # the benchmark is over
        return False
    return True


def report(seconds: Mapping[str, list[float]], units: float, unit: str) -> dict[str, Any]:
    """Print each contender's rate, and how much faster the first is than each other, pair by pair; returns the figures.

    `ratio` is that to the second contender, where there are more; None if there is only one.
    """
    width = max(map(len, seconds))
    figures: dict[str, Any] = {"unit": unit}
    for name, values in seconds.items():
        rates = sorted(units / value for value in values)
        figures[name] = statistics.median(rates)
        spread = f"(of {len(rates)}: {rates[0]:.1f} .. {rates[-1]:.1f})"
        print(f"{name:{width}} {figures[name]:10.1f} {unit}  {spread}")
    (first, of_first), *others = seconds.items()
    ratios = {}
    for name, of_other in others:
        pairs = sorted(b / a for a, b in zip(of_first, of_other, strict=True))
        ratios[f"{first} / {name}"] = statistics.median(pairs)
        print(f"{first} / {name}: {ratios[f'{first} / {name}']:.2f}  (pair by pair: {pairs[0]:.2f} .. {pairs[-1]:.2f})")
    return {"ratio": next(iter(ratios.values()), None), "ratios": ratios, "figures": figures, **where()}


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` on each of `count` ranks, in processes of their own; returns what the first rank returns."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        left = Path(folder) / "result.json"
        torch.multiprocessing.spawn(_on_rank, (count, port, left, function, arguments), nprocs=count)
        return json.loads(left.read_text())


def _on_rank(
    rank: int, count: int, port: int, left: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    runtime.initialize()
    result = function(*arguments)
    if rank == 0:
        left.write_text(json.dumps(result))
    runtime.shutdown()


def where() -> dict[str, Any]:
    """The machine and what is installed."""
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"machine": machine, "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
