"""Proof of a conversion: every tensor compared bit by bit, and both models run on the same tokens."""

import gc
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_rlhf.conversion.architecture import Order
from megatron_rlhf.conversion.check.layers import Ran, run_megatron, run_transformers
from megatron_rlhf.conversion.check.tokens import Batch, vocabulary_pieces
from megatron_rlhf.conversion.hf.folder import same_bits
from megatron_rlhf.conversion.hf.weights import Described, Weights
from megatron_rlhf.conversion.whole_tensors import CHUNK_BYTES, Place, TensorSource, places, row_pieces
from megatron_rlhf.parallel.layout import ParallelLayout

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output. Summing in another order gives 1e-6 to 1e-5 in fp32; a
wrong epsilon, activation or rotary table gives more than 1e-3."""


class CheckFailed(Exception):
    """The two models of a conversion differ. The message names the first place where they do."""


def compare_tensors(megatron: TensorSource, hf: Weights) -> int:
    """Compare every Hugging Face tensor with the converted one, bit by bit; returns how many there are.

    Raises:
        CheckFailed: naming the first that differs.
    """
    names = set()
    for place in places(hf.stored_shapes, hf.num_layers):
        for name, value, stored in _side_by_side(megatron, hf, place):
            if not same_bits(value, stored):
                raise CheckFailed(f"tensor {name} ({place} of ours) differs: {_difference(value, stored)}")
            names.add(name)
    return len(names)


def _side_by_side(megatron: TensorSource, hf: Weights, place: Place) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Hugging Face's names for one of our tensors, each with our values and Hugging Face's."""
    mapping, shape = hf.described.hf_tensor(place.key), megatron.shapes[place.key]
    if mapping.order is Order.same and not mapping.transposed:  # an embedding among them: gigabytes, so in pieces
        (name,) = hf.described.hf_shapes(place)
        for rows in row_pieces(shape, math.prod(shape[1:]) * megatron.dtype(place.key).itemsize, CHUNK_BYTES):
            yield name, megatron.read(place, rows), hf.files.read(hf.stored(name), rows)
    else:
        for name, value in hf.described.to_hf(place, megatron.read(place)):
            yield name, value, hf.files.read(hf.stored(name))


def _difference(megatron: Tensor, hf: Tensor) -> str:
    if megatron.shape != hf.shape or megatron.dtype != hf.dtype:
        return f"{list(megatron.shape)} {megatron.dtype} against {list(hf.shape)} {hf.dtype}"
    gap = (megatron.double() - hf.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values, by up to {float(gap.max()):.3g}"


@torch.no_grad()
def compare_outputs(
    megatron: TensorSource, hf: Weights, layout: ParallelLayout, batches: Sequence[Batch]
) -> tuple[float, float]:
    """Run both models on the same tokens.

    Returns:
        The largest difference of outputs, and the largest output.

    Args:
        layout: a layout of one rank.

    Raises:
        CheckFailed: naming the first layer whose output differs, when it is more than TOLERANCE.
    """
    megatron_run = run_megatron(hf.described, megatron, layout, batches)
    gc.collect()  # modules are reference cycles: free Megatron-Core's before transformers' is built
    hf_run = run_transformers(hf, batches)
    gaps, sizes = _compare_heads(hf.described, megatron_run, hf_run)
    for i, batch in enumerate(batches):
        if not gaps[i] <= TOLERANCE * max(sizes[i], 1.0):
            raise CheckFailed(
                f"outputs differ by {gaps[i]:.3g} (largest output {sizes[i]:.3g}, tolerance {TOLERANCE:g} of it), "
                f"padding on the {'left' if batch.left else 'right'}; the first to differ is "
                + _first(megatron_run.outcomes[i].trace, hf_run.outcomes[i].trace)
            )
    return max(gaps), max(sizes)


def _compare_heads(described: Described, megatron: Ran, hf: Ran) -> tuple[list[float], list[float]]:
    """Largest difference and largest output of each batch; in pieces, because a vocabulary is large."""
    pairs = [(a.hidden_nh, b.hidden_nh) for a, b in zip(megatron.outcomes, hf.outcomes, strict=True)]
    gaps, sizes = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for piece in [slice(0, 1)] if described.scalar else vocabulary_pieces(described.model):
        megatron_head, hf_head = megatron.head(piece), hf.head(piece)
        for i, (megatron_nh, hf_nh) in enumerate(pairs):
            for a, b in zip(megatron_nh.split(256), hf_nh.split(256), strict=True):
                expected = hf_head(b)
                # Of a NaN, torch's maximum is NaN.
                gaps[i] = torch.maximum(gaps[i], (megatron_head(a) - expected).abs().max().cpu())
                sizes[i] = torch.maximum(sizes[i], expected.abs().max().cpu())
    return gaps.tolist(), sizes.tolist()


def _first(megatron: list[Tensor], hf: list[Tensor]) -> str:
    for i, (a, b) in enumerate(zip(megatron, hf, strict=True)):
        if not (a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1.0):
            return "the embedding" if i == 0 else f"layer {i - 1}"
    return "the final norm or the head"
