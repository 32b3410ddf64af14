"""One role's part of a checkpoint: each rank writes its parts into a file of its own, a thread may do it.

Megatron-Core's own writers start processes, which outlive a rank that is killed (0.16.1), or threads that sync no file
before it counts (0.19): the files are torch's `FileSystemWriter`'s, synced, with checksums of what was written to them.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rlhf.checkpoint.integrity import agree
from megatron_rlhf.checkpoint.parts import Part
from megatron_rlhf.parallel.collectives import gather_on_first_rank

BACKEND, VERSION = "torch_dist", 1


@dataclasses.dataclass
class ToWrite:
    """What one rank writes of a role."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    objects: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By their names in the checkpoint."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is the same on all ranks: the first one writes it."""


class _Planner(DefaultSavePlanner):
    """Says what this rank writes, and hands it over when it is written, one piece at a time."""

    def __init__(self, state: ToWrite, copy: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        items: list[WriteItem] = []
        self._values: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        for part in state.parts:
            items.append(_item(part))
            self._values[items[-1].index] = part.data.to("cpu", copy=True) if copy else part.data
        for name, value in state.objects.items():
            content = io.BytesIO()
            torch.save([value], content)
            items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
            self._values[items[-1].index] = content
        self.plan = SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self._values.pop(write_item.index)  # nothing is kept once it is written
        return value if isinstance(value, io.BytesIO) else value.cpu()


def _item(part: Part) -> WriteItem:
    place = torch.Size(part.offsets)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(place, part.data.shape),
        properties=TensorProperties(dtype=part.data.dtype),
        size=torch.Size(part.shape),
    )
    return WriteItem(MetadataIndex(part.key, place), WriteItemType.SHARD, tensor_data=data)


class _Writer(FileSystemWriter):
    """torch's, into one synced file per rank, without recording where it was written.

    The folder will be renamed, and Python 3.13 pickles a path in a way that 3.12 cannot read.
    """

    def __init__(self, folder: Path) -> None:
        # Before writing torch would copy on a stream of the calling thread's GPU; a thread may write while it computes.
        super().__init__(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self.digests = _Digests()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Digests(FileSystem):
    """Takes the checksum of every file that is written."""

    def __init__(self) -> None:
        self.by_name: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            digesting = _Digesting(stream)
            yield digesting
        self.by_name[Path(path).name] = digesting.digest.hexdigest()


class _Digesting(io.RawIOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        super().close()
        self._file.close()


@dataclasses.dataclass
class RoleFiles:
    """This rank's part in writing one role. `plan`, `write`, `finish`; the first and the last are collective."""

    folder: Path
    writer: _Writer
    planner: DefaultSavePlanner
    results: list[WriteResult] = dataclasses.field(default_factory=list)

    @classmethod
    def plan(cls, folder: Path, state: ToWrite, copy: bool) -> "RoleFiles":
        """Make the role's folder. Collective; raises NotWritten on all ranks.

        Args:
            folder: the role's own.
            copy: copy to host memory what this rank writes, because it will change before it is written.
        """
        return cls.begin(folder, _Planner(state, copy), state.common)

    @classmethod
    def begin(cls, folder: Path, planner: DefaultSavePlanner, common: Mapping[str, Any]) -> "RoleFiles":
        """The same for a planner that says what this rank writes, in its `plan`."""
        error = None
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True)
                content = io.BytesIO()  # to a path, torch would write with errors that do not say "disk full"
                torch.save(common, content)
                (folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())
            except OSError as problem:
                error = problem
        agree(error)
        return cls(folder, _Writer(folder), planner)

    def write(self) -> None:
        """Write and sync this rank's file. No collectives: a thread may do it."""
        if self.planner.plan.items:
            # torch names a file after the place that its plan has among those of all ranks.
            plans = [*[SavePlan([])] * dist.get_rank(), self.planner.plan]
            mine = self.writer.prepare_global_plan(plans)[-1]
            self.results = self.writer.write_data(mine, self.planner).wait()

    @property
    def digests(self) -> dict[str, str]:
        """Checksums of this rank's files, by their names inside `folder`."""
        names = {result.storage_data.relative_path for result in self.results}  # not the description, which is renamed
        return {name: self.writer.digests.by_name[name] for name in names}

    def finish(self) -> None:
        """Write the files' description, once all ranks are done. Collective; raises NotWritten on all ranks."""
        gathered = gather_on_first_rank((self.planner.plan, self.results))
        error: Exception | None = None
        if gathered:
            try:
                _, metadata = self.planner.create_global_plan([plan for plan, _ in gathered])
                self.writer.finish(metadata, [results for _, results in gathered])
                save_config(CheckpointingConfig(BACKEND, VERSION), str(self.folder))
            except (OSError, RuntimeError, ValueError) as problem:  # ValueError: the parts do not make up the whole
                error = problem
        agree(error)
