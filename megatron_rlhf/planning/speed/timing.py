"""Seconds and FLOPs of passes through a placed model, from a cluster's stated rates (docs/planner.md).

FLOPs are model FLOPs: 2 per weight and token forward, 4 backward, and attention's scores (causal: half of them).
"""

import math
from dataclasses import dataclass

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.speed import layers, links
from megatron_rlhf.planning.speed.layers import Passes

REFILLS = 8
"""A batch of slots is refilled whenever one slot in this many is free (`rollout.scheduler.REFILL_SHARE`)."""


@dataclass(frozen=True)
class Batch:
    """Microbatches of one kind on each data-parallel copy, with their mean tokens."""

    microbatches: int
    tokens: float
    """Of one microbatch."""
    length: float
    """Of one sequence: a token attends to half of it, on average."""
    wanted: float = 1.0
    """Share of the tokens whose logits a loss reads."""


def forward_flops(placed: PlacedModel, tokens: float, length: float, wanted: float = 1.0) -> float:
    """FLOPs of the whole model for `tokens` in sequences of `length`, a share `wanted` of which have logits."""
    model = placed.model
    scores = 2 * model.num_layers * parameters.attention_width(model) * length
    unembedding = 0.0 if placed.scalar else wanted * model.vocab_size * model.hidden_size
    return tokens * (2 * (parameters.matmul_parameters(model, scalar=True) + unembedding) + scores)


def schedule_seconds(placed: PlacedModel, cluster: ClusterConfig, batches: list[Batch], backward: bool) -> list[float]:
    """Seconds of one pipeline schedule over all the batches' microbatches, by batch; filling and draining is shared by time.

    The slowest stage works on all microbatches; before and after, one passes through the other stages. The interleaved
    schedule takes as many microbatches as there are stages at a time: idle ones fill up the last round.
    """
    stages = placed.parallel.pipeline
    count = sum(batch.microbatches for batch in batches)
    filled = math.ceil(count / stages) * stages / count if placed.parallel.virtual_stages > 1 and count else 1.0
    slowest = [microbatch_seconds(placed, cluster, batch, backward) for batch in batches]
    busy = [filled * batch.microbatches * seconds for batch, seconds in zip(batches, slowest, strict=True)]
    whole = max((_all_stages(placed, cluster, batch).total(backward) for batch in batches), default=0.0)
    idle = (stages - 1) / placed.parallel.virtual_stages * whole / stages
    return [seconds + idle * seconds / sum(busy) if seconds else 0.0 for seconds in busy]


def bubble(placed: PlacedModel, microbatches: int) -> float:
    """Share of a schedule in which a stage waits: (p - 1) / (v m + p - 1)."""
    idle = (placed.parallel.pipeline - 1) / placed.parallel.virtual_stages
    return idle / (microbatches + idle)


def microbatch_seconds(placed: PlacedModel, cluster: ClusterConfig, batch: Batch, backward: bool) -> float:
    """The slowest stage with one microbatch: its layers, the last one's head, messages to the next stage."""
    one, head = _layer(placed, cluster, batch), _head(placed, cluster, batch)
    first, last = (one * placed.stage_layers(stage) for stage in placed.ends)
    seconds = max(first.total(backward), (last + head).total(backward))
    if placed.parallel.pipeline > 1 and not placed.execution.hides_pipeline:
        parts = placed.parallel.tensor if placed.execution.scatters_messages else placed.sequence_parts
        parts *= placed.parallel.context
        size = batch.tokens * placed.model.hidden_size * placed.element / parts
        directions = 2 if backward else 1
        seconds += directions * placed.parallel.virtual_stages * links.message(size, placed, cluster)
    return seconds


def update_seconds(
    placed: PlacedModel, cluster: ClusterConfig, average: bool = False, beside: Batch | None = None
) -> float:
    """After the schedule: sum gradients over data parallelism, Adam, gather weights, moving average.

    Args:
        beside: the microbatches behind whose last backward and first forward pass the exchange is hidden, where it is.
    """
    count = max(placed.trained_parameters(stage) for stage in placed.ends)
    shards = placed.data * placed.parallel.context if placed.parallel.distributed_optimizer else 1
    group = links.data_group(placed, cluster)
    scatter = links.gather(count * placed.execution.gradient_bytes, group, cluster)
    spread = scatter
    if placed.parallel.distributed_optimizer:
        spread = links.gather(count * (placed.execution.weight_bytes or placed.element), group, cluster)
    if beside is not None:
        hidden = _layer(placed, cluster, beside) * placed.most_layers
        scatter -= min(scatter, hidden.backward) if placed.execution.hides_gradients else 0.0
        spread -= min(spread, hidden.forward) if placed.execution.hides_weights else 0.0
    touched = count * (4 * FP32 + placed.element) + 6 * FP32 * count / shards
    touched += 2 * FP32 * count / shards if average else 0
    return scatter + spread + touched / cluster.memory_rate


def decode_passes(rows: int, slots: int, response: float, limit: int) -> float:
    """Decoding passes for `rows` sequences in `slots`, which waiting prompts refill: full until the last prompt has begun.

    From then on the slots drain, and some response nearly always reaches the limit.
    """
    fuller = 2 * REFILLS / (2 * REFILLS - 1)  # between two refills some slots are free
    return max(rows / slots - 1, 0) * response * fuller + limit


def decode_seconds(
    placed: PlacedModel,
    cluster: ClusterConfig,
    rows: int,
    slots: int,
    prompt: float,
    passes: float,
    cached: float,
    batches: int,
) -> float:
    """Sampling `rows` sequences on each copy.

    Args:
        slots: of one batch; all of them take part in every pass.
        prompt: mean tokens of a prompt; prompts are read when slots are free.
        passes: that yield a token (`decode_passes`).
        cached: tokens that attention reads of each slot.
        batches: of slots, that are in flight at once if there are prompts for them.
    """
    stages = placed.parallel.pipeline
    slots = min(slots, rows)
    in_flight = min(batches, math.ceil(rows / slots))
    one = layers.decoding_layer(placed, cluster, slots, cached)
    head = layers.head(placed, cluster, slots, loss=False).forward + cluster.layer_launch_s  # and sampling
    first, last = (one * placed.stage_layers(stage) for stage in placed.ends)
    step = max(first, last + head)
    if stages > 1:
        step += links.message(slots * placed.model.hidden_size * placed.element, placed, cluster)
    rounds = 1 + REFILLS * max(rows / (slots * in_flight) - 1, 0.0)
    batch = Batch(in_flight, rows * prompt / rounds / in_flight, prompt, wanted=1 / prompt if prompt else 1.0)
    prefill = sum(schedule_seconds(placed, cluster, [batch], backward=False)) if prompt else 0.0
    return passes * step * (in_flight + stages - 1) + rounds * prefill


def _layer(placed: PlacedModel, cluster: ClusterConfig, batch: Batch) -> Passes:
    return layers.layer(placed, cluster, batch.tokens, batch.length)


def _head(placed: PlacedModel, cluster: ClusterConfig, batch: Batch) -> Passes:
    return layers.head(placed, cluster, batch.tokens * batch.wanted)


def _all_stages(placed: PlacedModel, cluster: ClusterConfig, batch: Batch) -> Passes:
    return _layer(placed, cluster, batch) * placed.model.num_layers + _head(placed, cluster, batch)
