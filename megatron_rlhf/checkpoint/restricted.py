"""The only way in which checkpoints are read: data is loaded, code is not.

Two parts of torch's distributed checkpoints are pickles that torch's own reader runs: `.metadata`, and the objects
between the tensors in `.distcp` files. Whatever reads a checkpoint in this process (this package, Megatron-Core, torch)
goes through the two methods that are replaced here. The third, `common.pt`, is checked before Megatron-Core reads it.
docs/security.md lists everything that is opened, and how.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum, EnumMeta
from pathlib import Path, PurePath
from typing import IO, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_rlhf.config.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"
"""Megatron-Core's file for everything that is not a tensor."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that allows some names; any other one stops the reading before anything is called."""

    ALLOWED: ClassVar[Mapping[str, set[str]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class MetadataUnpickler(_Unpickler):
    """Reads the description of a distributed checkpoint."""

    ALLOWED: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
        "pathlib": {"PosixPath", "PurePosixPath"},
        "collections": {"OrderedDict"},
    }


class ScalesUnpickler(_Unpickler):
    """Reads the state that Transformer Engine pickles for a layer in fp8: tensors, numbers, and the recipe."""

    ALLOWED: ClassVar = {
        "torch": {"Size", "device", *MetadataUnpickler.ALLOWED["torch"]},
        "torch._utils": {"_rebuild_tensor_v2"},
        "torch.storage": {"UntypedStorage", "TypedStorage"},
        "collections": {"OrderedDict"},
        "transformer_engine.common.recipe": {
            *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
            *("Format", "_FormatHelper"),
            *("MMParams", "QParams"),
        },
        "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    }

    TENSORS: ClassVar = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
    """What reads a tensor: torch's, which Megatron-Core 0.19 replaces."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.TENSORS:
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Enum:
    """`getattr` for enumeration members, which Python before 3.11.4 pickles with it, and for nothing else."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for {name} of {kind!r}")
    return kind.__members__[name]


def load_metadata(folder: Path) -> Metadata:
    """The description of the distributed checkpoint in `folder`.

    Raises:
        UserError: it is missing or broken, or names a type that does not belong in it or a file outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            return _metadata(file)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not the metadata of a distributed checkpoint: {error}") from error


def _metadata(file: IO[bytes]) -> Metadata:
    try:
        metadata = MetadataUnpickler(file).load()
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:  # opcodes that make no sense
        raise pickle.UnpicklingError(str(error)) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, Mapping):
        raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}")
    for place in (metadata.storage_data or {}).values():
        name = PurePath(getattr(place, "relative_path", ""))
        if name.is_absolute() or ".." in name.parts:
            raise pickle.UnpicklingError(f"it names {name}, a file outside of the checkpoint")
    return metadata


def load_plain(file: Path | IO[bytes], where: str) -> Any:
    """What `torch.save` wrote, if it consists only of tensors, numbers, texts and containers; else UserError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{where}: not plain data, or broken: {_reason(error)}") from error


def require_plain_common(folder: Path) -> None:
    """Raise UserError when what Megatron-Core reads in addition to a role's tensors is more than plain data."""
    if (folder / COMMON).is_file():  # later versions of Megatron-Core write none
        load_plain(folder / COMMON, str(folder / COMMON))


def require_plain_scales(state: Mapping[str, Any], where: str) -> None:
    """The same for the state of fp8 layers that was loaded with a model: Transformer Engine unpickles it."""
    for name, value in _extra_states(state):
        if isinstance(value, Tensor):
            value = io.BytesIO(value.detach().cpu().numpy().tobytes())
        if isinstance(value, io.BytesIO) and value.getvalue():
            content = value.getvalue()
            try:
                if content.startswith(b"PK"):  # of torch.save
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                else:
                    ScalesUnpickler(io.BytesIO(content)).load()
            except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ImportError) as error:
                raise UserError(f"{where}: {name} is more than the scales of a layer: {_reason(error)}") from error


def _extra_states(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in state.items() if name.endswith("_extra_state"))


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), None)
    return named or (lines[0] if lines else type(error).__name__)


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    metadata = load_metadata(Path(self.path))
    metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    name = read_item.dest_index.fqn
    loaded = load_plain(value, f"the checkpoint's object {name}")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
