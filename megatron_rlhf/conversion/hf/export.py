"""Our tensors as a Hugging Face folder: sharded safetensors with an index, config.json, and extra files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.checkpoint.draft import on_each_rank
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.conversion import key_maps
from megatron_rlhf.conversion.architecture import FINAL_NORM, HEAD, HEAD_BIAS, Architecture, Head
from megatron_rlhf.conversion.hf import config as hf_config
from megatron_rlhf.conversion.hf.folder import INDEX, WEIGHTS, write_tensors
from megatron_rlhf.conversion.hf.weights import Described
from megatron_rlhf.conversion.whole_tensors import EVERY_ROW, Place, TensorSource, places

SHARD_BYTES = 5 * 10**9
_FINAL_BIAS = f"{FINAL_NORM}.bias"


def choose_architecture(model: ModelConfig, wanted: str | None, origin: str | None = None) -> Architecture:
    """The architecture to write a model as: the one asked for, else the first that has all it needs.

    Args:
        origin: what the model was trained from, tried first.

    Raises:
        UserError: naming what no architecture, or not the requested one, can express of the model.
    """
    # Llama before its descendants: a model that fits several of them gets the oldest name.
    likely = sorted(key_maps.names(), key=lambda name: (name != origin, name != "llama", name))
    reasons = {}
    for name in [wanted] if wanted else likely:
        architecture = hf_config.find_architecture({"model_type": name}, "--architecture")
        obstacles = hf_config.obstacles(model, architecture)
        if not obstacles:
            return architecture
        reasons[name] = ", ".join(obstacles)
    raise UserError(
        "no Hugging Face architecture has this model's shape: "
        + "; ".join(f"{name} lacks {reason}" for name, reason in reasons.items())
    )


@dataclass(frozen=True)
class AsType:
    """The same tensors in another type; None leaves each as it is."""

    source: TensorSource
    as_dtype: torch.dtype | None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.source.shapes

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    def dtype(self, key: str) -> torch.dtype:
        return self.as_dtype or self.source.dtype(key)

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        return self.source.read(place, rows).to(self.dtype(place.key))


@dataclass(frozen=True)
class Exported:
    """Our tensors as exported: those that the Hugging Face class has a place for.

    A sequence classifier's head has no bias. Added to the final norm's bias, in the head's direction, it has the same
    effect; a model whose final norm has none keeps it as a separate tensor, and `modeling_reward.py` beside the weights
    reads it.
    """

    described: Described
    source: TensorSource
    score_bias: float
    """Of a sequence classifier."""

    @classmethod
    def of(cls, described: Described, source: TensorSource) -> "Exported":
        bias = float(source.read(Place(HEAD_BIAS, None))) if described.head is Head.score else 0.0
        return cls(described, source, bias)

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        keep = self.described.head is Head.token or self.needs_code
        return {key: shape for key, shape in self.source.shapes.items() if key != HEAD_BIAS or keep}

    @property
    def needs_code(self) -> bool:
        """The head has a bias that no class of transformers has a place for."""
        return self.score_bias != 0 and _FINAL_BIAS not in self.source.shapes

    def dtype(self, key: str) -> torch.dtype:
        # In a shorter type, rounding would lose the score's bias in the sum.
        return torch.float32 if key == _FINAL_BIAS and self.score_bias else self.source.dtype(key)

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        tensor = self.source.read(place, rows)
        if place.key == _FINAL_BIAS and self.score_bias:
            head = self.source.read(Place(HEAD, None)).double()[0]
            tensor = tensor.double() + (self.score_bias * head / head.square().sum())[rows]
        return tensor.to(self.dtype(place.key))


def write_weights(folder: Path, exported: Exported, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors files, one in memory at a time, and their index. Collective: ranks share the files.

    Raises NotWritten, or UserError for what cannot be read, on all ranks.
    """
    shards = _plan_shards(exported, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]

    def write() -> None:
        for i in range(dist.get_rank(), len(shards), dist.get_world_size()):
            _write_shard(folder / names[i], exported, shards[i])
        if len(shards) > 1 and dist.get_rank() == 0:
            listed = {
                tensor: name
                for name, shard in zip(names, shards, strict=True)
                for place in shard
                for tensor in exported.described.hf_shapes(place)
            }
            total = sum(_bytes(exported, place) for shard in shards for place in shard)
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=2))

    on_each_rank(write)


def _write_shard(path: Path, exported: Exported, shard: list[Place]) -> None:
    tensors = {
        name: tensor for place in shard for name, tensor in exported.described.to_hf(place, exported.read(place))
    }
    write_tensors(path, tensors)


def _plan_shards(exported: Exported, limit: int) -> list[list[Place]]:
    shards: list[list[Place]] = [[]]
    filled = 0
    for place in places(exported.shapes, exported.num_layers):
        size = _bytes(exported, place)
        if filled + size > limit and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(place)
        filled += size
    return shards


def _bytes(exported: Exported, place: Place) -> int:
    return math.prod(exported.shapes[place.key]) * exported.dtype(place.key).itemsize


def _shard_name(index: int, count: int) -> str:
    stem, suffix = WEIGHTS.split(".")
    return f"{stem}-{index + 1:05d}-of-{count:05d}.{suffix}"
