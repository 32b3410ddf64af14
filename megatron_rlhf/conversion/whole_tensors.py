"""Tensors of a distributed checkpoint, one at a time and whole: no model is built, no layout chosen.

Loading a role asks each rank for its part of every tensor; a converter wants the opposite, every part of one tensor,
and little more memory than that one needs.
"""

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rlhf.checkpoint.draft import on_each_rank
from megatron_rlhf.checkpoint.restricted import load_metadata
from megatron_rlhf.checkpoint.role_files import RoleFiles
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.architecture import is_layer

EVERY_ROW = slice(None)
CHUNK_BYTES = 2**26
"""Tensors are written in chunks of rows of about this size, so that reading some rows reads few others with them."""


@dataclass(frozen=True)
class Place:
    """One of a model's tensors: its name and, inside the layers, the layer's number."""

    key: str
    layer: int | None

    def __str__(self) -> str:
        return self.key if self.layer is None else self.key.replace("layers.", f"layers.{self.layer}.")


def places(keys: Mapping[str, Any], num_layers: int) -> list[Place]:
    """Every tensor of a model, layer by layer, the tensors before the layers first."""
    outside = [Place(key, None) for key in keys if not is_layer(key)]
    return outside + [Place(key, layer) for layer in range(num_layers) for key in keys if is_layer(key)]


class TensorSource(Protocol):
    """Anything that our tensors can be read from, one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Our tensors, whole; those of a layer once."""

    @property
    def num_layers(self) -> int: ...

    def dtype(self, key: str) -> torch.dtype:
        """Type of the stored tensor."""

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        """One tensor, or some rows of it."""


def row_pieces(shape: tuple[int, ...], row_bytes: int, limit: int) -> list[slice]:
    """The rows of a tensor in consecutive pieces of at most `limit` bytes, one row at least."""
    step = max(limit // max(row_bytes, 1), 1)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


@dataclass(frozen=True)
class CheckpointReader:
    """Reads whole tensors of one role of a checkpoint."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    num_layers: int
    prefix: str = ""
    """Prefix that the writer of the checkpoint put before our names."""

    @cached_property
    def _storage(self) -> dcp.FileSystemReader:
        return dcp.FileSystemReader(self.folder)

    @cached_property
    def _metadata(self) -> Metadata:
        metadata = load_metadata(self.folder)
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        return metadata

    def dtype(self, key: str) -> torch.dtype:
        """Type of the stored tensor."""
        return self._stored(key).properties.dtype

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        """One tensor, or some rows. What is stored beyond its shape is vocabulary padding, and is left out."""
        shape, stored = self.shapes[place.key], self._stored(place.key)
        inside = () if place.layer is None else (place.layer,)
        fits = len(stored.size) == len(inside) + len(shape)
        if not fits or any(a < b for a, b in zip(stored.size[len(inside) :], shape, strict=True)):
            raise UserError(f"{self.folder}: {place.key} is {list(stored.size)}; the model's shape wants {list(shape)}")
        start, stop, _ = rows.indices(shape[0])
        part = (stop - start, *shape[1:])
        result = torch.empty((1,) * len(inside) + part, dtype=stored.properties.dtype)
        offsets = torch.Size((*inside, start) + (0,) * (len(shape) - 1))
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=result.shape)
        items = create_read_items_for_chunk_list(self.prefix + place.key, stored, [wanted])
        try:
            self._storage.read_data(LoadPlan(items), _Into(result)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
            raise UserError(f"{self.folder}: the checkpoint is damaged, {place} cannot be read: {reason}") from error
        return result.reshape(part)

    def keys(self) -> list[str]:
        """Every stored tensor, by our name where it has one."""
        stored = self._metadata.state_dict_metadata
        return sorted(k.removeprefix(self.prefix) for k, v in stored.items() if isinstance(v, TensorStorageMetadata))

    def stored_rows(self, key: str) -> int:
        """Rows of a stored tensor outside the layers, including padding."""
        return self._stored(key).size[0]

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(self.prefix + key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder}: the checkpoint has no tensor {key}")
        return stored


class _Into(dcp.DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.target[tuple(map(_span, read_item.dest_offsets, read_item.lengths))]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def write_checkpoint(folder: Path, source: TensorSource) -> None:
    """Write a role's tensors as Megatron-Core's distributed checkpoint, reading one at a time. Collective.

    The tensors are divided among the ranks. Any layout can load the result. Raises NotWritten, or UserError for what cannot
    be read, on all ranks.
    """
    files = RoleFiles.begin(folder, _Streamed(source), {})
    on_each_rank(files.write)
    files.finish()


class _Streamed(dcp.DefaultSavePlanner):
    """Plans every tensor without loading any; each is read when the storage writes it."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source = source
        items = [
            self._item(place, rows)
            for place in places(self.source.shapes, self.source.num_layers)
            for rows in self._pieces(place)
        ]
        self.plan = SavePlan(items[dist.get_rank() :: dist.get_world_size()])

    def _pieces(self, place: Place) -> list[slice]:
        shape = self.source.shapes[place.key]
        return row_pieces(shape, math.prod(shape[1:]) * self.source.dtype(place.key).itemsize, CHUNK_BYTES)

    def _item(self, place: Place, rows: slice) -> WriteItem:
        shape = self.source.shapes[place.key]
        inside = () if place.layer is None else (place.layer,)
        offset = torch.Size((*inside, rows.start) + (0,) * (len(shape) - 1))
        part = (rows.stop - rows.start, *shape[1:])
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=torch.Size((1,) * len(inside) + part)),
            properties=TensorProperties(dtype=self.source.dtype(place.key)),
            size=torch.Size((self.source.num_layers,) * len(inside) + shape),
        )
        return WriteItem(MetadataIndex(place.key, offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        data, index = write_item.tensor_data, write_item.index
        assert data is not None and index.offset is not None, index
        layer = index.offset[0] if is_layer(index.fqn) else None
        first = 0 if layer is None else 1
        rows = slice(index.offset[first], index.offset[first] + data.chunk.sizes[first])
        tensor = self.source.read(Place(index.fqn, layer), rows)
        return tensor.to(data.properties.dtype).contiguous().view(data.chunk.sizes)
