"""Seconds that a layer and a head take on one rank for one microbatch: products, attention, memory traffic, exchanges, launches.

Every figure is a count of FLOPs or bytes over a rate of the cluster. Products take the sum of both, so that small ones, and
those of few tokens, reach a smaller share of the peak.
"""

from dataclasses import dataclass

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.config.model import Activation, Positions, Precision, Recompute
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.speed import links

# Times that a layer's elementwise kernels read or write the residual stream: forward, two norms (2 each) and two residual
# additions (3 each); backward, the norms (3 each), dropout (2 each) and the sums of two gradients (3 each).
_STREAM_FORWARD, _STREAM_BACKWARD = 10, 16
_SCORE_BYTES_FORWARD, _SCORE_BYTES_BACKWARD = 13, 22
"""Unfused attention: a score is written, masked and normalised, dropped out (1 byte of mask) and read again, in 2 bytes."""
_LOSS_BYTES = 50
"""A logit in a loss: copied to fp32, its maximum, exponential, sum, gradient."""
_FUSED_BACKWARD = 2.5
"""Products of fused attention's backward pass over those of its forward pass: five instead of two."""
_CAST_BYTES = 4
"""To fp8 and its transpose: read in 2 bytes, write 1 twice."""


@dataclass(frozen=True)
class Passes:
    """Seconds of a forward and of a backward pass."""

    forward: float
    backward: float

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "Passes":
        return Passes(times * self.forward, times * self.backward)

    def at_least(self, forward: float) -> "Passes":
        """A backward pass launches about twice as many kernels as the forward pass."""
        return Passes(max(self.forward, forward), max(self.backward, 2 * forward))

    def total(self, backward: bool) -> float:
        return self.forward + (self.backward if backward else 0.0)


def layer(placed: PlacedModel, cluster: ClusterConfig, tokens: float, length: float) -> Passes:
    """One layer for a microbatch of `tokens` in sequences of `length`."""
    tokens = tokens / placed.parallel.context
    kernels = _products(placed, cluster, tokens) + _attention(placed, cluster, tokens, length)
    kernels += _elementwise(placed, cluster, tokens) + _tensor_exchange(placed, cluster, tokens)
    kernels += _context_exchange(placed, cluster, tokens)
    kernels = kernels.at_least(cluster.layer_launch_s)
    again = placed.execution.recomputed_share * kernels.forward if placed.recomputes else 0.0
    return Passes(kernels.forward, kernels.backward + again)


def decoding_layer(placed: PlacedModel, cluster: ClusterConfig, rows: float, cached: float) -> float:
    """One layer for the next token of each of `rows` sequences, of which `cached` tokens are kept."""
    heads = parameters.query_groups(placed.model) * parameters.head_dim(placed.model) / placed.parallel.tensor
    cache = rows * cached * 2 * heads * placed.element / cluster.memory_rate
    kernels = _products(placed, cluster, rows) + _elementwise(placed, cluster, rows)
    kernels += _tensor_exchange(placed, cluster, rows)
    return max(kernels.forward + cache, cluster.layer_launch_s)


def head(placed: PlacedModel, cluster: ClusterConfig, tokens: float, loss: bool = True) -> Passes:
    """The unembedding and the loss of the last stage; a scalar head takes no time worth counting."""
    if placed.scalar:
        return Passes(0.0, 0.0)
    tokens = tokens / placed.parallel.context
    width = parameters.padded_vocabulary(placed.model, placed.parallel.tensor) / placed.parallel.tensor
    passes = _product(placed, cluster, tokens, placed.model.hidden_size, width, in_fp8=False)
    traffic = _LOSS_BYTES * tokens * width / cluster.memory_rate
    return passes + Passes(traffic / 2, traffic / 2) if loss else passes


def _products(placed: PlacedModel, cluster: ClusterConfig, tokens: float) -> Passes:
    """Queries, keys and values; attention's output; the MLP's two matrices."""
    model, t = placed.model, placed.parallel.tensor
    hidden, ffn = model.hidden_size, parameters.ffn_width(model)
    shapes = [
        (hidden, parameters.qkv_width(model) / t),
        (parameters.attention_width(model) / t, hidden),
        (hidden, parameters.first_mlp_width(model) / t),
        (ffn / t, hidden),
    ]
    in_fp8 = placed.precision is Precision.fp8_hybrid
    passes = Passes(0.0, 0.0)
    for width, out in shapes:
        passes += _product(placed, cluster, tokens, width, out, in_fp8)
    return passes


def _product(
    placed: PlacedModel, cluster: ClusterConfig, tokens: float, width: float, out: float, in_fp8: bool
) -> Passes:
    """[tokens, width] x [width, out], and the two products of its backward pass, whose weight gradient is added in fp32."""
    read, element, memory = 1 if in_fp8 else placed.element, placed.element, cluster.memory_rate
    flops = 2 * tokens * width * out / cluster.flops_per_s(placed.precision if in_fp8 else placed.outside_fp8)
    inputs, outputs, weights = tokens * width, tokens * out, width * out
    forward = flops + (read * (inputs + weights) + element * outputs) / memory
    backward = 2 * flops + (read * (outputs + weights) + element * inputs) / memory
    backward += (read * (inputs + outputs) + 2 * FP32 * weights) / memory
    if in_fp8:
        forward, backward = forward + _CAST_BYTES * inputs / memory, backward + _CAST_BYTES * outputs / memory
    return Passes(forward, backward)


def _attention(placed: PlacedModel, cluster: ClusterConfig, tokens: float, length: float) -> Passes:
    """Scores and their products with the values. Fused kernels skip what is masked, and are never in fp8."""
    model, precision = placed.model, placed.outside_fp8
    flops = 4 * tokens * length * parameters.attention_width(model) / placed.parallel.tensor
    if placed.execution.fused_attention:
        forward = flops / 2 / (cluster.attention_efficiency * cluster.peak_flops_per_s(precision))
        return Passes(forward, _FUSED_BACKWARD * forward)
    products = flops / cluster.flops_per_s(precision)
    scores = tokens * length * model.num_attention_heads / placed.parallel.tensor / cluster.memory_rate
    forward = products + _SCORE_BYTES_FORWARD * scores
    again = forward if placed.parallel.recompute is Recompute.selective else 0.0
    return Passes(forward, 2 * products + _SCORE_BYTES_BACKWARD * scores + again)


def _elementwise(placed: PlacedModel, cluster: ClusterConfig, tokens: float) -> Passes:
    """Norms, residual additions, activation, rotations: as many bytes as they read and write."""
    model, t = placed.model, placed.parallel.tensor
    stream = tokens * model.hidden_size / placed.sequence_parts
    gated = model.activation is Activation.swiglu
    inner = tokens * parameters.ffn_width(model) / t
    rotated = 2 * tokens * parameters.qkv_width(model) / t if model.positions is Positions.rope else 0.0
    forward = _STREAM_FORWARD * stream + (3 if gated else 2) * inner + rotated
    backward = _STREAM_BACKWARD * stream + (5 if gated else 3) * inner + rotated
    return Passes(forward, backward) * (placed.element / cluster.memory_rate)


def _tensor_exchange(placed: PlacedModel, cluster: ClusterConfig, tokens: float) -> Passes:
    """Forward, the inputs of two column-parallel products are gathered and two outputs summed. Backward, the sums are hidden
    behind products of weight gradients, and what is left are sequence parallelism's two gathers."""
    size = tokens * placed.model.hidden_size * placed.element
    one = links.gather(size, links.tensor_group(placed, cluster), cluster)
    if placed.execution.hides_tensor:
        one /= placed.parallel.tensor
    return Passes(4 * one, 2 * one if placed.sequence_parts > 1 else 0.0)


def _context_exchange(placed: PlacedModel, cluster: ClusterConfig, tokens: float) -> Passes:
    """Keys and values are gathered; backward, their gradients are summed over the ranks that used them."""
    if placed.parallel.context == 1:
        return Passes(0.0, 0.0)
    width = 2 * parameters.query_groups(placed.model) * parameters.head_dim(placed.model) / placed.parallel.tensor
    size = tokens * placed.parallel.context * width * placed.element
    group = links.context_group(placed, cluster)
    return Passes(links.gather(size, group, cluster), links.all_reduce(size, group, cluster))
