"""Temporary bytes: saved activations, logits, the key/value cache.

The terms are the tensors that our layers save for the backward pass, as measured on a CPU; Transformer Engine's fused
layers save the same or less.
"""

from dataclasses import dataclass

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel

LOGITS_AT_ONCE = 2**24
"""Logits that the loss processes at a time, on a GPU (`parallel.vocab`)."""
MOST_LOGITS = 2**26
"""Logits that exist at a time, on a GPU (`models.logits`)."""


@dataclass(frozen=True)
class Shape:
    """Sequences of one microbatch."""

    rows: int
    length: int
    wanted: float = 1.0
    """Share of the tokens whose logits a loss reads; a language model's reads all."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def training_peak(
    placed: PlacedModel, stage: int, shape: Shape, microbatches: int, dropout: float = 0.0
) -> dict[str, float]:
    """Peak memory of a rank of a stage, in a schedule of `microbatches` on each data-parallel copy."""
    chunks = _chunks_in_flight(placed, stage, microbatches)
    chunk_layers = placed.stage_layers(stage) / placed.parallel.virtual_stages
    first, last = stage == 0, stage == placed.parallel.pipeline - 1
    layer = layer_saved(placed, shape, dropout)
    stream = _stream(placed, shape)
    kept = stream if placed.recomputes else layer
    saved = chunks * chunk_layers * kept
    if first and dropout:
        saved += chunks / placed.parallel.virtual_stages * stream / placed.element
    head = 2 * stream if last else 0.0  # in and out of the final norm; one microbatch at a time reaches it
    logits = logits_peak(placed, shape) if last and not placed.scalar else 0.0
    # Head and logits are freed when the first layer runs backward: the larger of the two counts.
    working = backward_working(placed, shape) + (layer - stream if placed.recomputes else 0.0)
    return {"activations": saved + head, "buffers": max(working - head - logits, 0.0), "logits": logits}


def layer_saved(placed: PlacedModel, shape: Shape, dropout: float = 0.0) -> float:
    """Saved by one layer for its backward pass, without recomputation."""
    model, t, e = placed.model, placed.parallel.tensor, placed.element
    tokens = shape.tokens / placed.parallel.context
    # In and out; RMSNorm keeps the normalised input too where torch composes it from parts (on a CPU, in fp32).
    norm_copies = 2 if model.norm is Norm.layernorm else 3
    qkv = parameters.qkv_width(model)
    attention = parameters.attention_width(model)
    elements = qkv + attention  # queries, keys, values; the context
    if model.positions is Positions.rope:  # rotated queries and keys are new tensors
        elements += attention + (qkv - attention) // 2
    ffn = parameters.ffn_width(model)
    elements += (5 if model.activation is Activation.swiglu else 2) * ffn
    saved = tokens * e * elements / t + 2 * norm_copies * _stream(placed, shape)
    saved += tokens * FP32 * model.num_attention_heads / t  # log-sum-exp of the attention
    if dropout:
        saved += 2 * _stream(placed, shape) / e  # masks, one byte per element
    if model.positions is Positions.rope:
        saved += 4 * shape.length * parameters.head_dim(model) * e  # cosines and sines, for queries and keys
    return saved


def backward_working(placed: PlacedModel, shape: Shape) -> float:
    """Gradients alive inside one layer's backward pass, where the MLP's are largest."""
    model, e = placed.model, placed.element
    tokens = shape.tokens / placed.parallel.context
    gathered = tokens * model.hidden_size * e if placed.sequence_parts > 1 else 0.0
    return (
        tokens * e * parameters.first_mlp_width(model) / placed.parallel.tensor + 2 * _stream(placed, shape) + gathered
    )


def logits_peak(placed: PlacedModel, shape: Shape) -> float:
    """Logits and what the loss computes from them, vocabulary-parallel: their gradient, and fp32 copies of parts."""
    width = parameters.padded_vocabulary(placed.model, placed.parallel.tensor) // placed.parallel.tensor
    logits = shape.tokens * shape.wanted * width
    if logits > MOST_LOGITS:  # in parts: in fp32, exponentials beside them, and the gradient in the model's type
        return MOST_LOGITS * (2 * FP32 + (placed.element if placed.element != FP32 else 0))
    part = min(logits, LOGITS_AT_ONCE) * FP32
    forward, backward = 2 * part, logits * placed.element + part * (placed.element != FP32)
    return logits * placed.element + max(forward, backward)


def scoring_peak(placed: PlacedModel, shape: Shape) -> dict[str, float]:
    """A forward pass without gradients: one layer at a time, then the logits."""
    logits = 0.0 if placed.scalar else logits_peak(placed, shape)
    return {"buffers": max(forward_working(placed, shape) - logits, 0.0), "logits": logits}


def forward_working(placed: PlacedModel, shape: Shape) -> float:
    """Alive inside one layer's forward pass: the residual stream and the MLP's inner tensors."""
    model, e = placed.model, placed.element
    tokens = shape.tokens / placed.parallel.context
    inner = parameters.first_mlp_width(model) + parameters.ffn_width(model)
    return tokens * e * (inner / placed.parallel.tensor + 3 * model.hidden_size)


def cache_bytes(placed: PlacedModel, stage: int, rows: int, length: int) -> float:
    """Keys and values of `rows` sequences on one rank of a stage."""
    model = placed.model
    heads = parameters.query_groups(model) * parameters.head_dim(model) / placed.parallel.tensor
    return 2 * placed.stage_layers(stage) * heads * length * placed.element * rows


def _stream(placed: PlacedModel, shape: Shape) -> float:
    """The residual stream of a microbatch, split along the sequence if the layout says so."""
    tokens = shape.tokens / placed.parallel.context / placed.sequence_parts
    return tokens * placed.model.hidden_size * placed.element


def _chunks_in_flight(placed: PlacedModel, stage: int, microbatches: int) -> int:
    """Model chunks whose activations a stage holds at once in Megatron-Core's 1F1B and interleaved schedules."""
    stages, virtual = placed.parallel.pipeline, placed.parallel.virtual_stages
    if virtual == 1:
        return min(stages - stage, microbatches)
    warmup = 2 * (stages - stage - 1) + (virtual - 1) * stages
    return min(warmup + 1, microbatches * virtual)
