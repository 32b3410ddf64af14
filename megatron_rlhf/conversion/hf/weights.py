"""A Hugging Face model's shape in our terms, and its weights, read as our tensors block by block."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.conversion.architecture import (
    HEAD,
    HEAD_BIAS,
    WORD_EMBEDDINGS,
    Architecture,
    Head,
    HFTensor,
    Run,
    is_layer,
    tensor_shapes,
)
from megatron_rlhf.conversion.hf import config as hf_config
from megatron_rlhf.conversion.hf.folder import CONFIG, TensorFiles, read_json, same_bits
from megatron_rlhf.conversion.whole_tensors import EVERY_ROW, Place, places


@dataclass(frozen=True)
class Described:
    """A model's shape as one of Hugging Face's architectures."""

    architecture: Architecture
    model: ModelConfig
    head: Head

    @classmethod
    def read(cls, folder: Path) -> "Described":
        """What a folder's config.json says; UserError for what cannot be converted."""
        content, where = read_json(folder / CONFIG), str(folder / CONFIG)
        architecture = hf_config.find_architecture(content, where)
        head = hf_config.read_head(content, architecture, where)
        return cls(architecture, hf_config.to_model_config(content, architecture, where), head)

    @property
    def scalar(self) -> bool:
        """It gives one number per token."""
        return self.head is not Head.language

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our tensors, whole."""
        return tensor_shapes(self.model, self.scalar)

    def hf_tensor(self, key: str) -> HFTensor:
        """Where Hugging Face keeps one of our tensors."""
        return self.architecture.hf_tensor(key, self.head)

    def runs(self, place: Place) -> list[Run]:
        """Our tensor's rows, first to last, as runs of Hugging Face's."""
        return self.hf_tensor(place.key).runs(self.shapes[place.key][0], self.model, place.layer)

    def hf_shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the Hugging Face tensors that one of our tensors holds."""
        counts: dict[str, int] = {}
        for run in self.runs(place):
            counts[run.name] = counts.get(run.name, 0) + run.count
        rest = self.shapes[place.key][1:]
        transposed = self.hf_tensor(place.key).transposed
        return {name: (*rest, count) if transposed else (count, *rest) for name, count in counts.items()}

    def to_hf(self, place: Place, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that one of our tensors holds, with their values."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        position = 0
        for run in self.runs(place):
            parts.setdefault(run.name, []).append((run.start, tensor[position : position + run.count]))
            position += run.count
        transposed = self.hf_tensor(place.key).transposed
        for name, pieces in parts.items():
            ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
            value = tensor if len(parts) == len(ordered) == 1 else torch.cat(ordered)
            yield name, value.T.contiguous() if transposed else value


@dataclass(frozen=True)
class Weights:
    """Our tensors, read from a Hugging Face folder."""

    described: Described
    files: TensorFiles
    shapes: dict[str, tuple[int, ...]]
    """Our tensors that can be read from this folder, whole."""
    stored_shapes: dict[str, tuple[int, ...]]
    """Those of them that are in the files: a sequence classifier's head has no bias, and our bias is then 0."""
    missing_prefix: str
    """What is missing from names in the files: the base model's prefix, where it was saved without a head."""

    @classmethod
    def open(cls, folder: Path, described: Described, with_head: bool = True, allow_pickle: bool = False) -> "Weights":
        """Check that the files hold exactly the tensors that config.json describes; read none of them yet."""
        files, prefix = TensorFiles.open(folder, allow_pickle), described.architecture.prefix
        bare = not any(name.startswith(prefix) for name in files.shapes)
        shapes = dict(described.shapes)
        if not with_head:
            shapes.pop(HEAD, None)
        stored = dict(shapes)
        if described.scalar and described.hf_tensor(HEAD_BIAS).names[0] not in files.shapes:
            del stored[HEAD_BIAS]
        weights = cls(described, files, shapes, stored, prefix if bare else "")
        weights._require_exactly_these_tensors()
        return weights

    @property
    def num_layers(self) -> int:
        return self.described.model.num_layers

    def dtype(self, key: str) -> torch.dtype:
        """Type of the stored tensor."""
        key = key if key in self.stored_shapes else HEAD
        first = Place(key, 0 if is_layer(key) else None)
        return self.files.dtypes[self.stored(self.described.runs(first)[0].name)]

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        """One of our tensors, or some rows of it."""
        shape = self.shapes[place.key]
        start, stop, _ = rows.indices(shape[0])
        rest = shape[1:]
        return self.block(place.key, place.layer, (start,) + (0,) * len(rest), (stop - start, *rest))

    def block(self, key: str, layer: int | None, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A block of one of our tensors. Rows past the end (vocabulary padding) are zero."""
        if key not in self.stored_shapes:
            return torch.zeros(shape, dtype=self.dtype(key))
        start, stop = offset[0], offset[0] + shape[0]
        columns = slice(offset[1], offset[1] + shape[1]) if len(shape) > 1 else slice(None)
        transposed = self.described.hf_tensor(key).transposed
        parts, position = [], 0
        for run in self.described.runs(Place(key, layer)):
            first, last = max(start - position, 0), min(stop - position, run.count)
            if first < last:
                rows = slice(run.start + first, run.start + last)
                name = self.stored(run.name)
                parts.append(
                    self.files.read(name, columns, rows).T if transposed else self.files.read(name, rows, columns)
                )
            position += run.count
        padding = stop - max(start, position)
        if padding > 0:
            parts.append(torch.zeros(padding, *shape[1:], dtype=self.dtype(key)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def require_one_type_a_tensor(self) -> None:
        """Raise UserError where layers differ in the type of a tensor: a checkpoint stores it stacked, in one type."""
        for place in places(self.stored_shapes, self.num_layers):
            wanted = self.dtype(place.key)
            for name in map(self.stored, self.described.hf_shapes(place)):
                if (found := self.files.dtypes[name]) != wanted:
                    raise UserError(f"{self.files.files[name]}: tensor {name} is {found}, its like elsewhere {wanted}")

    def stored(self, name: str) -> str:
        """The name that a Hugging Face tensor has in the files."""
        return name.removeprefix(self.missing_prefix)

    def _require_exactly_these_tensors(self) -> None:
        folder, found = self.files.folder, self.files.shapes
        expected = {
            self.stored(name): shape
            for place in places(self.stored_shapes, self.num_layers)
            for name, shape in self.described.hf_shapes(place).items()
        }
        for name, shape in expected.items():
            if name not in found:
                raise UserError(f"{folder}: tensor {name} {list(shape)} is missing, which {CONFIG} calls for")
            if found[name] != shape:
                wrong = f"tensor {name} is {list(found[name])}; {CONFIG} calls for {list(shape)}"
                raise UserError(f"{self.files.files[name]}: {wrong}")
            if not (dtype := self.files.dtypes[name]).is_floating_point:
                raise UserError(f"{self.files.files[name]}: tensor {name} is {dtype}: quantized, not supported")
        unknown = [name for name in found if name not in expected and not self._may_be_ignored(name)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UserError(
                f"{self.files.files[unknown[0]]}: {CONFIG} does not call for tensor {unknown[0]}{more}"
                + ("; it differs from the embeddings that it should repeat" if unknown[0] == self._head_name else "")
            )

    @property
    def _head_name(self) -> str:
        return self.described.architecture.tensors[HEAD].names[0]

    def _may_be_ignored(self, name: str) -> bool:
        if any(re.fullmatch(pattern, self.missing_prefix + name) for pattern in self.described.architecture.unused):
            return True
        if name != self._head_name or self.described.scalar:
            return False
        # The unembedding of a language model whose head is not wanted, or tied embeddings that were stored twice.
        wanted = HEAD in self.shapes or self.described.model.tied_embeddings
        return not wanted or self._repeats_embeddings(name)

    def _repeats_embeddings(self, name: str) -> bool:
        # In pieces: a vocabulary can be gigabytes.
        embeddings = self.stored(self.described.hf_tensor(WORD_EMBEDDINGS).names[0])
        rows = self.files.shapes[embeddings][0]
        pieces = [slice(start, start + 8192) for start in range(0, rows, 8192)]
        return self.files.shapes[name] == self.files.shapes[embeddings] and all(
            same_bits(self.files.read(name, piece), self.files.read(embeddings, piece)) for piece in pieces
        )
