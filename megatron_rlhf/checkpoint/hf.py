"""Hugging Face folders as a source of weights for any role at any layout."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_rlhf.checkpoint import hf_config
from megatron_rlhf.checkpoint.architecture import (
    HEAD,
    HEAD_BIAS,
    WORD_EMBEDDINGS,
    Architecture,
    Theirs,
    is_layer,
    tensor_shapes,
)
from megatron_rlhf.checkpoint.hf_folder import CONFIG, TensorFiles, read_json, same_bits
from megatron_rlhf.checkpoint.sharded import META
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.models.roles import Role

log = logging.getLogger(__name__)


def is_hf_folder(path: str | Path) -> bool:
    """The folder holds a Hugging Face model, not a checkpoint of ours."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / META).exists()


def read_model_config(folder: str | Path) -> tuple[ModelConfig, bool]:
    """Shape of the model in a Hugging Face folder, and whether it has a scalar head.

    Raises:
        UserError: for an architecture, or a feature of one, that our modules do not have.
    """
    described = Described.read(Path(folder))
    return described.model, described.scalar_head is not None


def load_into(role: Role, folder: str | Path) -> None:
    """Fill a role's weights, at its layout, from a Hugging Face folder; each rank reads only what it holds.

    A scalar role filled from a language model keeps the head that it was built with.

    Raises:
        UserError: when a tensor is missing, unknown, of another shape, or the role cannot take this model.
    """
    described = Described.read(Path(folder))
    if described.scalar_head is not None and not role.scalar:
        raise UserError(f"{folder}: its head gives one number a token; the {role.name} needs a language model")
    source = Weights.open(described, with_head=described.scalar_head is not None or not role.scalar)
    if role.scalar and described.scalar_head is None:
        log.info("%s: the scalar head is new, the rest comes from the language model in %s", role.name, folder)
    with role.layout, torch.no_grad():
        for tensor in sharded_tensors(role):
            if source.holds(tensor.key):
                tensor.data.copy_(source.block_of(tensor))


def sharded_tensors(role: Role) -> Iterator[ShardedTensor]:
    """This rank's weights as blocks of whole tensors, each with its name and place; their data is the role's own."""
    for module in role.modules:
        for entry in module.sharded_state_dict().values():
            if isinstance(entry, ShardedTensorFactory):  # the gate and up halves of SwiGLU
                yield from entry.build()
            elif isinstance(entry, ShardedTensor):
                yield entry


@dataclass(frozen=True)
class Described:
    """What a folder's config.json says."""

    folder: Path
    architecture: Architecture
    model: ModelConfig
    scalar_head: str | None
    """Name of its scalar head; None for a language model."""

    @classmethod
    def read(cls, folder: Path) -> "Described":
        content, where = read_json(folder / CONFIG), str(folder / CONFIG)
        architecture = hf_config.find_architecture(content, where)
        head = hf_config.scalar_head(content, architecture, where)
        return cls(folder, architecture, hf_config.to_model_config(content, architecture, where), head)


@dataclass(frozen=True)
class Weights:
    """Our tensors, block by block, read from a Hugging Face folder."""

    described: Described
    files: TensorFiles
    with_head: bool
    prefix: str
    """Put before the names in the files: the base model's, where it was saved alone."""

    @classmethod
    def open(cls, described: Described, with_head: bool = True) -> "Weights":
        """Check that the files hold exactly the tensors that config.json describes; read none of them yet."""
        files, prefix = TensorFiles.open(described.folder), described.architecture.prefix
        bare = not any(name.startswith(prefix) for name in files.shapes)
        weights = cls(described, files, with_head, prefix if bare else "")
        weights._require_exactly_these_tensors()
        return weights

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our tensors that can be read from here, whole."""
        head = self.described.scalar_head
        shapes = tensor_shapes(self.described.model, scalar=head is not None)
        if not self.with_head:
            shapes.pop(HEAD, None)
        if head is not None and self._stored(f"{head}.bias") not in self.files.shapes:
            del shapes[HEAD_BIAS]  # sequence classifiers have none: ours stays 0
        return shapes

    def holds(self, key: str) -> bool:
        """Our tensor of this name can be read from here."""
        return key in self.shapes

    def block_of(self, tensor: ShardedTensor) -> Tensor:
        """The block of a whole tensor that a rank holds."""
        layers = tensor.prepend_axis_num
        layer = tensor.global_offset[0] if layers else None
        return self.block(tensor.key, layer, tensor.global_offset[layers:], tuple(tensor.data.shape))

    def block(self, key: str, layer: int | None, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A block of one of our tensors. Rows past the end (vocabulary padding) are zero."""
        theirs = self._theirs(key)
        start, stop = offset[0], offset[0] + shape[0]
        columns = slice(offset[1], offset[1] + shape[1]) if len(shape) > 1 else slice(None)
        parts, position = [], 0
        for run in theirs.runs(self.shapes[key][0], self.described.model, layer):
            first, last = max(start - position, 0), min(stop - position, run.count)
            if first < last:
                parts.append(self._read(theirs, run.name, slice(run.start + first, run.start + last), columns))
            position += run.count
        missing = shape[0] - sum(len(part) for part in parts)
        if missing:
            assert stop > position, f"{key}: rows {start} to {stop} of {position}"
            like = parts[0] if parts else torch.zeros((), dtype=torch.float32)
            parts.append(like.new_zeros(missing, *shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _read(self, theirs: Theirs, name: str, rows: slice, columns: slice) -> Tensor:
        stored = self._stored(name)
        return self.files.read(stored, columns, rows).T if theirs.transposed else self.files.read(stored, rows, columns)

    def _theirs(self, key: str) -> Theirs:
        return self.described.architecture.theirs(key, self.described.scalar_head)

    def _stored(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the files must hold."""
        model, found = self.described.model, {}
        for key, (rows, *rest) in self.shapes.items():
            theirs = self._theirs(key)
            for layer in range(model.num_layers) if is_layer(key) else [None]:
                counts: dict[str, int] = {}
                for run in theirs.runs(rows, model, layer):
                    counts[run.name] = counts.get(run.name, 0) + run.count
                for name, count in counts.items():
                    found[self._stored(name)] = (*rest, count) if theirs.transposed else (count, *rest)
        return found

    def _require_exactly_these_tensors(self) -> None:
        folder, expected, found = self.described.folder, self.expected(), self.files.shapes
        for name, shape in expected.items():
            if name not in found:
                raise UserError(f"{folder}: tensor {name} {list(shape)} is missing, which {CONFIG} calls for")
            if found[name] != shape:
                raise UserError(
                    f"{self.files.files[name]}: tensor {name} is {list(found[name])}; {CONFIG} calls for {list(shape)}"
                )
        unknown = [name for name in found if name not in expected and not self._may_be_ignored(name)]
        if unknown:
            raise UserError(
                f"{self.files.files[unknown[0]]}: {len(unknown)} tensors that {CONFIG} does not call for, such as {unknown[0]}"
            )

    def _may_be_ignored(self, name: str) -> bool:
        architecture = self.described.architecture
        if any(re.fullmatch(pattern, self.prefix + name) for pattern in architecture.unused):
            return True
        if name != architecture.tensors[HEAD].names[0] or self.described.scalar_head is not None:
            return False
        return not self.with_head or self._repeats_embeddings(name)

    def _repeats_embeddings(self, name: str) -> bool:
        # Some files hold tied embeddings twice. Compared in pieces: a vocabulary can be gigabytes.
        embeddings = self._stored(self._theirs(WORD_EMBEDDINGS).names[0])
        rows = self.files.shapes[embeddings][0]
        pieces = (slice(start, start + 8192) for start in range(0, rows, 8192))
        return self.files.shapes[name] == self.files.shapes[embeddings] and all(
            same_bits(self.files.read(name, piece), self.files.read(embeddings, piece)) for piece in pieces
        )
