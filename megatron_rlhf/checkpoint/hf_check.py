"""Proof of a conversion: every tensor compared bit by bit, and both models run on the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlhf.checkpoint.hf_folder import same_bits
from megatron_rlhf.checkpoint.hf_weights import Weights
from megatron_rlhf.checkpoint.layerwise import Batch, Head, run_ours, run_theirs
from megatron_rlhf.checkpoint.whole import TensorSource, places
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.parallel.layout import ParallelLayout

TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest output. Summing in another order costs 1e-6 to 1e-5 in fp32;
a wrong epsilon, activation or rotary table costs more than 1e-3."""


class CheckFailed(Exception):
    """The two sides of a conversion differ. The message names the first place where they do."""


def sample_rows(model: ModelConfig, text: Sequence[int], length: int) -> list[list[int]]:
    """Random tokens over the whole length, a text, and a shorter row of random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.max_sequence_length)
    rows = [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in (length, max(length // 3, 1))]
    return [rows[0], *([list(text[:length])] if text else []), rows[1]]


def compare_tensors(ours: TensorSource, theirs: Weights) -> int:
    """Compare every tensor of theirs with what ours gives, bit by bit; returns how many there are.

    Raises:
        CheckFailed: naming the first that differs.
    """
    count = 0
    for place in places(theirs.stored_shapes, theirs.num_layers):
        for name, value in theirs.described.to_theirs(place, ours.read(place)):
            stored = theirs.files.read(theirs.stored(name))
            if not same_bits(value, stored):
                raise CheckFailed(f"tensor {name} ({place} of ours) differs: {_difference(value, stored)}")
            count += 1
    return count


def _difference(ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{list(ours.shape)} {ours.dtype} against {list(theirs.shape)} {theirs.dtype}"
    gap = (ours.double() - theirs.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values, by up to {float(gap.max()):.3g}"


@torch.no_grad()
def compare_outputs(
    ours: TensorSource, theirs: Weights, layout: ParallelLayout, rows: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Run both models on the same tokens, padded on the right and on the left.

    Returns:
        The largest difference of outputs, and the largest output.

    Args:
        layout: of one rank.

    Raises:
        CheckFailed: naming the first layer whose output differs, when it is more than TOLERANCE.
    """
    batches = [Batch.of(rows, left=False), Batch.of(rows, left=True)]
    our_outcomes, our_head = run_ours(theirs.described, ours, layout, batches)
    their_outcomes, their_head = run_theirs(theirs, batches)
    differences, sizes = [], []
    for batch, a, b in zip(batches, our_outcomes, their_outcomes, strict=True):
        difference, largest = _compare(our_head, their_head, a.hidden_nh, b.hidden_nh)
        if not difference <= TOLERANCE * max(largest, 1.0):
            raise CheckFailed(
                f"outputs differ by {difference:.3g} (largest output {largest:.3g}, tolerance {TOLERANCE:g} of it), "
                f"padding on the {'left' if batch.left else 'right'}; the first to differ is {_first(a.trace, b.trace)}"
            )
        differences.append(difference)
        sizes.append(largest)
    return max(differences), max(sizes)


def _compare(our_head: Head, their_head: Head, ours_nh: Tensor, theirs_nh: Tensor) -> tuple[float, float]:
    """Largest difference and largest value of the heads' outputs; in pieces, because a vocabulary is wide."""
    gaps, sizes = [], []
    for a, b in zip(ours_nh.split(256), theirs_nh.split(256), strict=True):
        expected = their_head(b)
        gaps.append((our_head(a) - expected).abs().max())
        sizes.append(expected.abs().max())
    return float(torch.stack(gaps).max()), float(torch.stack(sizes).max())  # of a NaN, torch's maximum is NaN


def _first(ours: list[Tensor], theirs: list[Tensor]) -> str:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not (a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1.0):
            return "the embedding" if i == 0 else f"layer {i - 1}"
    return "the final norm or the head"
