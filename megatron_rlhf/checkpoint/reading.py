"""Reads a rank's parts of a role from a checkpoint, from wherever other layouts have put them."""

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rlhf.checkpoint import restricted
from megatron_rlhf.checkpoint.parts import Part
from megatron_rlhf.config.errors import UserError


class RoleReader:
    """The files of one role. Not collective: each rank opens only what it needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata: Metadata = restricted.load_metadata(folder)

    def common(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        path = self.folder / restricted.COMMON
        return restricted.load_plain(path, str(path))

    def has_object(self, name: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(name), BytesStorageMetadata)

    def objects(self, names: Iterable[str]) -> dict[str, Any]:
        """Objects by their names; those that the checkpoint lacks are left out."""
        found = {}
        for name in filter(self.has_object, names):
            content = self._bytes(MetadataIndex(name))
            (found[name],) = restricted.load_plain(content, f"{self.folder}: the checkpoint's object {name}")
        return found

    @torch.no_grad()
    def read_into(self, parts: Sequence[Part]) -> None:
        """Fill the parts' memory. What is stored in one piece is read once, whatever the parts that it goes to."""
        wanted: dict[MetadataIndex, list[tuple[ReadItem, Tensor]]] = defaultdict(list)
        by_key: dict[str, list[Part]] = defaultdict(list)
        for part in parts:
            by_key[part.key].append(part)
        for key, same in by_key.items():
            stored = self._stored(same[0])
            chunks = [ChunkStorageMetadata(torch.Size(part.offsets), part.data.shape) for part in same]
            for item in create_read_items_for_chunk_list(key, stored, chunks):
                assert item.dest_index.index is not None
                wanted[item.storage_index].append((item, same[item.dest_index.index].data))
            for part in same:
                if part.may_be_cut:  # rows that are not stored pad the vocabulary
                    part.data.zero_()
        places = self._metadata.storage_data
        for index in sorted(wanted, key=lambda i: (places[i].relative_path, places[i].offset)):
            tensor = restricted.load_plain(self._bytes(index), f"{self.folder}: the checkpoint's tensor {index.fqn}")
            for item, target in wanted[index]:
                target[_within(item.dest_offsets, item.lengths)] = tensor[
                    _within(item.storage_offsets, item.lengths)
                ].to(target.device)

    def _stored(self, part: Part) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(part.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder}: the checkpoint has no tensor {part.key}")
        if len(stored.size) != len(part.shape) or (tuple(stored.size) != part.shape and not part.may_be_cut):
            raise UserError(
                f"{self.folder}: {part.key} is {list(stored.size)}; the model's shape wants {list(part.shape)}"
            )
        return stored

    def _bytes(self, index: MetadataIndex) -> io.BytesIO:
        place = self._metadata.storage_data[index]
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                return io.BytesIO(file.read(place.length))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _within(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
