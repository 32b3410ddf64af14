"""Keys and values of the sequences that are being decoded."""

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor


@dataclass
class KeyValueCache(BaseInferenceContext):
    """Each sequence has a slot: [slots, groups, capacity, d] per layer, keys already rotated. A token's place is its position.

    Before each forward pass, `prefill` or `decode` says what its rows are.
    """

    slots: int
    capacity: int
    """Length of the longest sequence that a slot can hold, in tokens."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The base class only keeps a configuration of Megatron-Core's engines. What the models read from a context is here.
        self.materialize_only_last_token_logits = False  # LanguageModel does that
        self.max_sequence_length = self.capacity  # sizes the rotary table
        self.sequence_len_offset = 0
        self._cos_sin: tuple[Tensor, Tensor] | None = None
        self._decodes = False
        self.wanted_n: Tensor | None = None
        """Places in [s, b], flattened, of the prompts' tokens whose logits are wanted. None: the pass reads no others."""

    def prefill(
        self, positions_bs: Tensor, last_b: Tensor | None = None, rows: Tensor | None = None, first: int = 0
    ) -> None:
        """The next pass reads whole prompts, which attend only to themselves.

        Args:
            positions_bs: of the tokens.
            last_b: column of each row's last real token, whose logits are wanted; the last column by default.
            rows: rows of the pass to keep, in slots `first`, `first + 1`, ...; a row may go into several slots.
        """
        self._positions_bs, self._cos_sin, self._decodes = positions_bs, None, False
        self._rows = rows
        count, length = positions_bs.shape
        row_b = torch.arange(count, device=positions_bs.device)
        self.wanted_n = (length - 1 if last_b is None else last_b) * count + row_b
        self._into = slice(first, first + (0 if rows is None else len(rows)))
        assert self._into.stop <= self.slots, f"cache of {self.slots} slots asked to fill slot {self._into.stop - 1}"

    def decode(self, lengths_b: Tensor, longest: int, aligned: bool) -> None:
        """The next pass reads one token each of the sequences in the first slots.

        Args:
            lengths_b: tokens that each slot holds.
            longest: keys to attend to, not counting the new one; no length is greater.
            aligned: all lengths are `longest`.
        """
        assert longest < self.capacity, f"cache of {self.capacity} tokens asked to hold {longest + 1}"
        self._positions_bs, self._cos_sin, self._decodes, self.wanted_n = lengths_b.unsqueeze(-1), None, True, None
        self._lengths_b, self._longest, self._aligned = lengths_b, longest, aligned
        self._row_indices = torch.arange(len(lengths_b), device=lengths_b.device)

    def is_static_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self._decodes

    def rotation(self, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [s, b, 1, d], of the current positions, for `rotate`; the first layer computes them for all layers.

        Angles are fp32; the results are rounded to the queries' type, as in Megatron-Core's pass over a whole sequence.
        """
        if self._cos_sin is None:
            angles_sb1d = frequencies[:, 0, 0][self._positions_bs].transpose(0, 1).unsqueeze(2)
            half = angles_sb1d.shape[-1] // 2
            sin_sb1d = angles_sb1d.sin().to(dtype)
            sin_sb1d[..., :half].neg_()
            self._cos_sin = angles_sb1d.cos().to(dtype), sin_sb1d
        return self._cos_sin

    def append(self, layer: int, key_sbgd: Tensor, value_sbgd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; returns those to attend to, as [s, b, groups, d] views."""
        if self._decodes:
            keys_bgsd, values_bgsd = self.extend(layer, key_sbgd[0], value_sbgd[0])
            return keys_bgsd.permute(2, 0, 1, 3), values_bgsd.permute(2, 0, 1, 3)
        if self._rows is not None:
            for cache, new_sbgd in zip(self._stored(layer, key_sbgd[0]), (key_sbgd, value_sbgd), strict=True):
                cache[self._into, :, : len(new_sbgd)] = new_sbgd.permute(1, 2, 0, 3)[self._rows]
        return key_sbgd, value_sbgd

    def extend(self, layer: int, key_bgd: Tensor, value_bgd: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one new token of each sequence; returns [b, groups, s, d] views."""
        stored, b = self._stored(layer, key_bgd), len(key_bgd)
        for cache, new_bgd in zip(stored, (key_bgd, value_bgd), strict=True):
            if self._aligned:
                cache[:b, :, self._longest] = new_bgd
            else:
                cache[self._row_indices, :, self._lengths_b] = new_bgd
        keys, values = (cache[:b, :, : self._longest + 1] for cache in stored)
        return keys, values

    def _stored(self, layer: int, like_bgd: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            _, g, d = like_bgd.shape
            keys, values = (like_bgd.new_zeros(self.slots, g, self.capacity, d) for _ in range(2))
            self.layers[layer] = keys, values  # zeros: masked entries must be finite
        return self.layers[layer]

    def take(self, rows: Tensor) -> None:
        """Fill the first slots from these; a slot may be taken several times."""
        for stored in self.layers.values():
            for cache in stored:
                cache[: len(rows)] = cache[rows]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Moves sequences to other slots; no slot is both a source and a target."""
        for stored in self.layers.values():
            for cache in stored:
                cache[targets] = cache[sources]


def decodes(context: object) -> TypeGuard[KeyValueCache]:
    """Whether a pass with this inference context reads one token each of the sequences in a cache."""
    return isinstance(context, KeyValueCache) and context.is_decode_only()
