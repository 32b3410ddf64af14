"""Seconds and FLOPs of passes through a placed model, from a cluster's stated rates. Communication is not overlapped.

FLOPs are model FLOPs: 2 per weight and token forward, 4 backward, and attention's scores (causal: half of them).
"""

from dataclasses import dataclass

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel

_MICROSECOND = 1e-6
_GB = 1e9


@dataclass(frozen=True)
class Batch:
    """Microbatches of one kind on each data-parallel copy, with their mean tokens."""

    microbatches: int
    tokens: float
    """Of one microbatch."""
    length: float
    """Of one sequence."""


def forward_flops(placed: PlacedModel, tokens: float, length: float) -> float:
    """FLOPs of the whole model for `tokens` in sequences of `length`."""
    model = placed.model
    scores = 2 * model.num_layers * parameters.attention_width(model) * length
    return tokens * (2 * parameters.matmul_parameters(model, placed.scalar) + scores)


def schedule_seconds(placed: PlacedModel, cluster: ClusterConfig, batches: list[Batch], backward: bool) -> list[float]:
    """Seconds of one pipeline schedule over all the batches' microbatches, by batch; the bubble is shared by time."""
    each = [microbatch_seconds(placed, cluster, batch, backward) for batch in batches]
    busy = [batch.microbatches * seconds for batch, seconds in zip(batches, each, strict=True)]
    idle = (placed.parallel.pipeline - 1) / placed.parallel.virtual_stages * max(each, default=0.0)
    return [seconds + idle * seconds / sum(busy) if seconds else 0.0 for seconds in busy]


def bubble(placed: PlacedModel, microbatches: int) -> float:
    """Share of a schedule in which a stage waits: (p - 1) / (v m + p - 1)."""
    idle = (placed.parallel.pipeline - 1) / placed.parallel.virtual_stages
    return idle / (microbatches + idle)


def microbatch_seconds(placed: PlacedModel, cluster: ClusterConfig, batch: Batch, backward: bool) -> float:
    """The slowest stage with one microbatch: its matrix products, tensor-parallel sums, messages to the next."""
    parallel, model = placed.parallel, placed.model
    passes = 1 if not backward else 4 if placed.recomputes else 3
    sums = 2 if not backward else 6 if placed.recomputes else 4  # all-reduces per layer
    share = _slowest_stage_share(placed)
    compute = passes * forward_flops(placed, batch.tokens, batch.length) * share / (parallel.tensor * parallel.context)
    tensor = batch.tokens / parallel.context * model.hidden_size * placed.element
    communication = placed.most_layers * sums * _all_reduce(tensor, parallel.tensor, _link(cluster, parallel.tensor))
    if parallel.pipeline > 1:
        messages = (2 if backward else 1) * parallel.virtual_stages
        communication += messages * tensor / placed.sequence_parts / (_link(cluster, cluster.gpus) * _GB)
    return compute / cluster.flops_per_s(placed.precision) + communication


def update_seconds(placed: PlacedModel, cluster: ClusterConfig, average: bool = False) -> float:
    """After the schedule: sum gradients over data parallelism, Adam, gather weights, moving average."""
    parallel = placed.parallel
    count = max(placed.parameters(stage) for stage in placed.ends)
    spanned = parallel.tensor * parallel.context * placed.data
    link = _link(cluster, spanned)
    shards = placed.data * parallel.context if parallel.distributed_optimizer else 1
    communication = _all_reduce(count * FP32, placed.data, link)
    if parallel.distributed_optimizer and placed.data > 1:  # reduce-scatter, then gather the weights
        communication = communication / 2 + count * placed.element / (link * _GB)
    touched = (
        count * (4 * FP32 + placed.element) + 6 * FP32 * count / shards + (2 * FP32 * count / shards if average else 0)
    )
    return communication + touched / _memory_rate(cluster)


def decode_passes(rows: int, slots: int, response: float, limit: int) -> float:
    """Decoding passes for `rows` sequences in `slots`, which waiting prompts refill: full until the last prompt has begun.

    From then on the slots drain, and some response nearly always reaches the limit.
    """
    return max(rows / slots - 1, 0) * response + limit


def decode_seconds(
    placed: PlacedModel, cluster: ClusterConfig, rows: int, batch_rows: int, prompt: float, passes: float, limit: int
) -> float:
    """Sampling `rows` sequences of up to `limit` tokens on each copy, as many batches of slots in flight as there are stages.

    A token takes the time of reading the stage's weights and the batch's keys and values, or that of its matrix
    products if longer.
    """
    stages = placed.parallel.pipeline
    batch_rows = min(batch_rows, rows)
    batches = -(-rows // batch_rows)
    split = placed.parallel.tensor * placed.parallel.context
    weights = max(placed.parameters(stage) for stage in placed.ends) * placed.element
    heads = parameters.query_groups(placed.model) * parameters.head_dim(placed.model) / placed.parallel.tensor
    cache = batch_rows * (prompt + limit / 2) * 2 * heads * placed.most_layers * placed.element
    products = forward_flops(placed, batch_rows, prompt + limit / 2) * _slowest_stage_share(placed) / split
    stage_step = max((weights + cache) / _memory_rate(cluster), products / cluster.flops_per_s(placed.precision))
    stage_step += placed.most_layers * cluster.decode_layer_overhead_us * _MICROSECOND
    decoding = passes * stage_step * (min(stages, batches) + stages - 1)
    prefill = schedule_seconds(placed, cluster, [Batch(batches, batch_rows * prompt, prompt)], backward=False)
    return decoding + sum(prefill)


def _slowest_stage_share(placed: PlacedModel) -> float:
    """The slowest stage's share of the FLOPs: its layers, and on the last stage the unembedding."""
    whole = parameters.matmul_parameters(placed.model, placed.scalar)
    layers = parameters.matmul_parameters(placed.model, scalar=True)
    first, last = (layers * placed.stage_layers(stage) / placed.model.num_layers for stage in placed.ends)
    return max(first, last + whole - layers) / whole


def _all_reduce(size: float, ranks: int, gb_per_s: float) -> float:
    """A ring: each rank sends 2 (n - 1) / n of the tensor."""
    return 2 * (ranks - 1) / ranks * size / (gb_per_s * _GB)


def _link(cluster: ClusterConfig, ranks: int) -> float:
    return cluster.node_gb_per_s if ranks <= cluster.gpus_per_node else cluster.network_gb_per_s


def _memory_rate(cluster: ClusterConfig) -> float:
    return cluster.memory_gb_per_s * cluster.memory_efficiency * _GB
