"""Tokens whose output is wanted: the last layer computes no other, and only attends to the rest.

Of its products, queries, keys and values remain for all tokens. The others (three quarters of a layer), norms and activations
are computed for responses, not for prompts, and for a reward, or before the first token is sampled, for one token of a text.

Legend: s x b = tokens of a microbatch, n = wanted ones, h = anything.
"""

import dataclasses
from typing import Any

from torch import Tensor

from megatron_rlhf.parallel.packing import Segments


def places_sb(place_n: Tensor, length: int, rows: int) -> Tensor:
    """Places in [b, s], flattened, as places in [s, b]."""
    return place_n if rows == 1 else place_n % length * rows + place_n // length


def at_places(x_sbh: Tensor, place_n: Tensor) -> Tensor:
    """[s, b, h] -> [n, 1, h], by places in [s, b]."""
    return x_sbh.flatten(0, 1).index_select(0, place_n).unsqueeze(1)


def narrowed(segments: Segments | None, layer: int, place_n: Tensor, longest: int) -> Segments:
    """What the layers are told, so that one of them computes only what is wanted.

    Args:
        longest: an upper bound of positions, where there are no segments.
    """
    segments = segments or Segments.of([], [], longest)
    return dataclasses.replace(segments, wanted=(layer, place_n))


def wanted_of(segments: Any, layer: int) -> Tensor | None:
    """Places of the tokens of which the layer is to compute its output, by what it was told; None: of all."""
    if not isinstance(segments, Segments) or segments.wanted is None:
        return None
    narrow, place_n = segments.wanted
    return place_n if narrow == layer else None
