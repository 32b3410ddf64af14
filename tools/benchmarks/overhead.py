"""The share of a PPO iteration that is neither model nor optimizer: resharding, data, exchange, logging, checkpoints.

Model is what runs inside Megatron-Core's schedules, forward and backward, losses and sampling included; optimizer is from the
gradients' norm to the new weights. A checkpoint is written in the background every `--save-every` iterations.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import ppo
from benchmarks.side_by_side import on_ranks, where
from benchmarks.small_world import make_world
from megatron_rlhf.parallel import pipeline
from megatron_rlhf.trainers.step import TrainedRole


def arguments(parser: argparse.ArgumentParser) -> None:
    """As for `ppo`, and on how many ranks."""
    ppo.arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, help="default 1; --set gives their layout")
    parser.add_argument("--save-every", type=int, default=5, help="iterations between checkpoints, default 5")
    parser.set_defaults(rounds=10)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Each rank in a process of its own; the figures are the first rank's."""
    options.response = options.response or (128 if options.varied else 64)
    options.set += [f"run.save_every={options.save_every}", "run.async_save=true"]
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), options)
        seconds = on_ranks(options.ranks, _iterations, Path(folder), options)
    shares = {
        part: statistics.median(spent / whole for spent, whole in zip(seconds[part], seconds["whole"], strict=True))
        for part in ("model", "optimizer", "rest")
    }
    for part, share in shares.items():
        print(f"{part:9} {share:6.1%} of an iteration of {statistics.median(seconds['whole']):.2f} s")
    return {"ratio": shares["rest"], "shares": shares, "seconds": seconds, **where()}


def _iterations(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    torch.set_num_threads(options.threads)
    spent = {"model": 0.0, "optimizer": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        return run

    choose = pipeline.get_forward_backward_func
    pipeline.get_forward_backward_func = lambda *args: timed("model", choose(*args))
    TrainedRole._apply_gradients = timed("optimizer", TrainedRole._apply_gradients)  # type: ignore[method-assign]
    trainer = ppo.our_trainer(folder, options)
    seconds: dict[str, list[float]] = {"model": [], "optimizer": [], "whole": [], "rest": []}
    step, began = trainer.train_step, 0.0

    def watched() -> dict[str, float]:
        nonlocal began
        now = time.perf_counter()
        if trainer.step > 1:
            seconds["whole"].append(now - began)
            for part, amount in spent.items():
                seconds[part].append(amount)
            seconds["rest"].append(now - began - sum(spent.values()))
        spent.update(model=0.0, optimizer=0.0)
        began = time.perf_counter()
        return step()

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.run()
    return seconds
