"""Adapters as whole tensors: where a checkpoint keeps them, and a model's weights with them added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_rlhf.config.lora import Adapter, projections
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.conversion.architecture import QKV, attention_shape
from megatron_rlhf.conversion.whole_tensors import EVERY_ROW, Place, TensorSource
from megatron_rlhf.models.adapters import SUFFIX, fuse, is_adapter

LAYERS = "decoder.layers."


def factor(linear: str, projection: str, which: str) -> str:
    """Our name of A or B of a projection, in all layers."""
    return f"{LAYERS}{linear}{SUFFIX}.{projection}_{which}"


def factor_shapes(model: ModelConfig, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Every factor of a model's adapters, whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in projections(model):
        for name, (rows, columns) in adapter.parts(linear, model).items():
            shapes[factor(linear, name, "a")] = (adapter.rank, columns)
            shapes[factor(linear, name, "b")] = (rows, adapter.rank)
    return shapes


def rows_of_projections(model: ModelConfig, linear: str) -> dict[str, Tensor]:
    """Each projection's rows in the weight of its linear layer, in the projection's own order."""
    groups = attention_shape(model)[1] if f"{LAYERS}{linear}" == QKV else 1
    parts = projections(model)[linear]
    owner = fuse([torch.full((rows,), i) for i, (rows, _) in enumerate(parts.values())], groups)
    return {name: (owner == i).nonzero().squeeze(1) for i, name in enumerate(parts)}


@dataclass(frozen=True)
class Merged:
    """A model's tensors with its adapters added to them, in fp32, as `Role.merge_adapters` does."""

    source: TensorSource
    """Of the adapters, too."""
    model: ModelConfig
    adapter: Adapter
    """Without targets: the model that was adapted."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: shape for key, shape in self.source.shapes.items() if not is_adapter(key)}

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        tensor = self.source.read(place, rows)
        linear = place.key.removeprefix(LAYERS).removesuffix(".weight")
        if not place.key.endswith(".weight") or linear not in projections(self.model):
            return tensor
        change = torch.zeros(self.shapes[place.key])
        for at, delta in self._changes(linear, place.layer):
            change[at] = delta
        return (tensor.float() + change[rows]).to(tensor.dtype)

    def _changes(self, linear: str, layer: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        rows = rows_of_projections(self.model, linear)
        for name in self.adapter.parts(linear, self.model):
            a, b = (self.source.read(Place(factor(linear, name, which), layer)).float() for which in "ab")
            yield rows[name], self.adapter.scale * (b @ a)
