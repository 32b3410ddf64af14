"""Bytes that stay on a GPU for the whole run: weights, gradients, optimizer state, moving average."""

from megatron_rlhf.config.model import Precision
from megatron_rlhf.planning.parameters import layer_parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel

Bytes = dict[str, float]


def frozen_bytes(placed: PlacedModel, stage: int) -> Bytes:
    """A frozen model."""
    return {"weights": placed.parameters(stage) * placed.element}


def trained_bytes(placed: PlacedModel, stage: int, average: bool = False) -> Bytes:
    """A trained model. Of what trains of it: fp32 gradients, two fp32 moments, and fp32 master weights unless its own are fp32.

    The distributed optimizer shards moments and master weights over data and context parallelism. Their moving average
    (`average`) is always sharded so.
    """
    count = placed.trained_parameters(stage)
    ranks = placed.data * placed.parallel.context
    shards = ranks if placed.parallel.distributed_optimizer else 1
    copies = 2 if placed.precision is Precision.fp32 else 3
    state: Bytes = {
        "weights": placed.parameters(stage) * placed.element,
        "gradients": count * FP32,
        "optimizer": count * copies * FP32 / shards,
    }
    if placed.precision is Precision.fp8_hybrid:  # kept between microbatches: one for each of the two matrix layouts
        state["fp8 weights"] = 2 * placed.stage_layers(stage) * layer_parameters(placed.model, placed.parallel.tensor)
    if average:
        state["ema"] = count * FP32 / ranks
    return state
