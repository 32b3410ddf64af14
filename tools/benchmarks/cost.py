"""How cost grows with the work: one update of a policy, and of a reward model, as one size after the other is doubled.

Time is the CPU's (`time.process_time`) on one thread, so that other work on the machine weighs little; memory is what torch
allocates beyond what was held before, at its peak. The slope is that of a line through the logarithms: 1 is proportional.
Theory counts FLOPs, and bytes of activations; what grows with something else, or not at all, makes a slope smaller.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reward import made_up
from benchmarks.side_by_side import on_ranks, where
from benchmarks.train import flops, megatron_update
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.trainers.reward_model import ranking_microbatches
from megatron_rlhf.trainers.step import TrainedRole


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    vocab: int = 4096
    batch: int = 2
    length: int = 256
    k: int = 0
    """Completions of a ranking; 0: a policy's update on text."""
    ranks: int = 1
    """Data parallelism; the batch is the same."""


SWEEPS: dict[str, Sequence[int]] = {
    "length": (256, 512, 1024, 2048),
    "hidden": (128, 256, 512, 1024),
    "batch": (2, 4, 8, 16),
    "vocab": (4096, 8192, 16384, 32768),
    "k": (2, 4, 8, 16),
    "ranks": (1, 2),
}
PROMPT, RESPONSE = 256, 64
"""Of rankings."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which sweeps, and where the plot goes."""
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="updates of which the fastest counts, default 2")
    parser.add_argument("--plot", type=Path, help="file to draw time and memory to")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A table for each sweep, its slopes and theory's."""
    shapes = {(name, size): shape_of(name, size) for name in options.sweeps for size in SWEEPS[name]}
    rows: list[dict[str, Any]] = []
    for ranks in sorted({shape.ranks for shape in shapes.values()}):
        here = {key: shape for key, shape in shapes.items() if shape.ranks == ranks}
        measured = on_ranks(ranks, measure, list(here.values()), options.repeats)
        for ((name, size), shape), (seconds, memory) in zip(here.items(), measured, strict=True):
            rows.append({"sweep": name, "size": size, "seconds": seconds, "bytes": memory, "flops": work(shape)})
    slopes: dict[str, dict[str, float]] = {}
    for name in options.sweeps:
        made = [row for row in rows if row["sweep"] == name]
        for row in made:
            figures = f"{row['seconds']:8.3f} s {row['bytes'] / 2**20:8.1f} MiB {row['flops'] / 1e9:8.1f} GFLOP"
            print(f"{name:7} {row['size']:6} {figures}")
        slopes[name] = {
            column: slope([row["size"] for row in made], [row[column] for row in made])
            for column in ("seconds", "bytes", "flops")
        }
        print("slopes: " + ", ".join(f"{column} {value:.2f}" for column, value in slopes[name].items()) + "\n")
    if options.plot:
        draw(rows, options.plot)
    gaps = [abs(made["seconds"] - made["flops"]) for made in slopes.values()]
    return {"ratio": max(gaps), "slopes": slopes, "rows": rows, **where()}


def shape_of(sweep: str, size: int) -> Shape:
    """The usual sizes but one."""
    return dataclasses.replace(Shape(batch=4) if sweep == "ranks" else Shape(), **{sweep: size})


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the line through the logarithms, by least squares."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)


def work(shape: Shape) -> float:
    """FLOPs of an update on each rank."""
    if not shape.k:
        return flops(argparse.Namespace(**vars(shape)))[1] / shape.ranks
    tokens = PROMPT + shape.k * RESPONSE
    attended = PROMPT**2 / 2 + shape.k * RESPONSE * (PROMPT + RESPONSE / 2)
    layers = shape.layers * (12 * shape.hidden**2 * tokens + 2 * shape.hidden * attended)
    unasked = (
        9 * shape.hidden**2 * (tokens - shape.k)
    )  # the last layer projects, and transforms, only tokens with a score
    return 6 * shape.batch * (layers - unasked)


def measure(shapes: Sequence[Shape], repeats: int) -> list[tuple[float, int]]:
    """For each: CPU seconds of the fastest update, and bytes at the peak of one."""
    torch.set_num_threads(1)
    return [_measure(ranking_update(shape) if shape.k else text_update(shape), repeats) for shape in shapes]


def _measure(update: Callable[[], object], repeats: int) -> tuple[float, int]:
    update()
    with torch.profiler.profile(profile_memory=True) as profile:
        update()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        update()
        seconds.append(time.process_time() - began)
    return min(seconds), peak


def text_update(shape: Shape) -> Callable[[], object]:
    """An update of a policy on text."""
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(0))
    return megatron_update(argparse.Namespace(**vars(shape)), tokens)


def ranking_update(shape: Shape) -> Callable[[], object]:
    """An update of a reward model on rankings that share a prompt."""
    sizes = {"vocab": shape.vocab, "prompt": PROMPT, "response": RESPONSE, "k": shape.k, "prompts": shape.batch}
    rankings = made_up(argparse.Namespace(**sizes))
    layout = ParallelLayout.create(ParallelConfig())
    layout.seed(0)
    model = ModelConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_sequence_length=PROMPT + RESPONSE,
    )
    role = Role.build("reward", model, layout, Precision.fp32, scalar=True)
    reward = TrainedRole.create(role, OptimizerConfig(lr=1e-4), Precision.fp32)
    return lambda: reward.update(ranking_microbatches(rankings, reward, shape.batch, shape.k), 1e-4)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time and memory, each divided by its first value, against size divided by its first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, column, title in zip(axes, ("seconds", "bytes"), ("CPU time of an update", "peak memory"), strict=True):
        for name in dict.fromkeys(row["sweep"] for row in rows):
            made = [row for row in rows if row["sweep"] == name]
            x = [row["size"] / made[0]["size"] for row in made]
            axis.loglog(x, [row[column] / made[0][column] for row in made], "o-", label=name, base=2)
        axis.plot((1, 8), (1, 8), "k:", linewidth=1, label="proportional")
        axis.set(xlabel="size, times the smallest", title=f"{title}, times the smallest")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
