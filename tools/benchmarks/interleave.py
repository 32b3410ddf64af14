"""PPO and pretraining microbatches in one pipeline schedule against two schedules, one after the other.

A schedule of m microbatches over p stages idles for (p - 1) / (m + p - 1) of its time (the bubble). One schedule of all
microbatches fills and drains the pipeline once, two do it twice. With fewer cores than stages no stage ever idles, and
both take the same time: the theory's figures are printed beside the measured ones.
"""

import argparse
import os
from functools import partial
from typing import Any

import torch

from benchmarks.side_by_side import alternate, on_ranks, report, sizes, where
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.trainers.step import TrainedRole


def arguments(parser: argparse.ArgumentParser) -> None:
    """Stages, and microbatches of each kind."""
    parser.add_argument("--pipeline", type=int, nargs="+", default=[2, 4], help="numbers of stages, default 2 4")
    sizes(parser, layers=8, hidden=256, vocab=1024, episodes=4, episode_length=96, texts=4, text_length=128, rounds=5)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Each number of stages in processes of its own. `ratio` is that of the first number."""
    cores = len(os.sched_getaffinity(0))
    made = {}
    for stages in options.pipeline:
        print(f"\n{stages} stages on {cores} cores, {options.episodes} episodes and {options.texts} texts an update")
        made[stages] = figures = on_ranks(stages, _stage, stages, options)
        both, (first, second) = options.episodes + options.texts, (options.episodes, options.texts)
        fill = stages - 1
        print(
            f"bubble by theory: {fill / (both + fill):.0%} of one schedule, {2 * fill / (both + 2 * fill):.0%} of two"
        )
        figures["by theory"] = (first + second + 2 * fill) / (both + fill)
        print(f"ratio by theory: {figures['by theory']:.2f} with a core for every stage")
    return {
        "ratio": made[options.pipeline[0]]["ratio"],
        "stages": {stages: {name: f[name] for name in ("ratio", "by theory", "figures")} for stages, f in made.items()},
        **where(),
    }


def _stage(stages: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    layout = ParallelLayout.create(ParallelConfig(pipeline=stages))
    layout.seed(0)
    shape = ModelConfig(
        num_layers=options.layers, hidden_size=options.hidden, num_attention_heads=4, vocab_size=options.vocab
    )
    trained = TrainedRole.create(
        Role.build("policy", shape, layout, Precision.fp32), OptimizerConfig(lr=1e-4), Precision.fp32
    )
    # A language model's loss for both kinds: what a schedule costs depends on lengths, not on the loss.
    episodes = partial(_microbatches, trained.role, options.episodes, options.episode_length, options.vocab)
    texts = partial(_microbatches, trained.role, options.texts, options.text_length, options.vocab)

    def one_schedule() -> None:
        trained.update([*texts(), *episodes()], lr=1e-4)

    def two_schedules() -> None:
        trained.accumulate(texts())
        trained.update(episodes(), lr=1e-4)

    seconds = alternate({"one schedule": one_schedule, "two schedules": two_schedules}, options.rounds)
    return report(seconds, 1, "updates/s") if layout.pp_rank == 0 else {}


def _microbatches(role: Role, count: int, length: int, vocab: int) -> list[Microbatch]:
    tokens = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(length))
    return language_model_microbatches(TokenBatch.pack(list(tokens), [1] * count), role, 1, "loss")
