"""One role's part of a checkpoint: torch's planner says which rank writes what, a thread of each rank may write it.

Megatron-Core gives every tensor its place in the whole model, and says which of several copies is the one to write. Its own
writers start processes, which outlive a rank that is killed (0.16.1), or threads that sync no file before it counts (0.19):
the files are torch's `FileSystemWriter`'s, which syncs them, and get their checksums here.
"""

import dataclasses
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rlhf.checkpoint.integrity import agree, digest

BACKEND, VERSION = "torch_dist", 1


class _Planner(DefaultSavePlanner):
    """Plans what Megatron-Core has prepared; after `take`, it returns the state as it was then, from host memory."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
        self._taken: dict[MetadataIndex, Any] = {}

    def take(self, items: list[WriteItem], copy: bool) -> None:
        """Copy the items to host memory, and release the state. `copy`: also what is in host memory already."""
        for item in items:
            data = self.lookup_object(item.index)  # objects are packed into bytes already
            self._taken[item.index] = data if isinstance(data, io.BytesIO) else data.detach().to("cpu", copy=copy)
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._taken[write_item.index]

    def forget(self) -> None:
        """Free the memory: all is written."""
        self._taken = {}


class _Writer(FileSystemWriter):
    """torch's, into one synced file per rank, without recording where it was written.

    The folder will be renamed, and Python 3.13 pickles a path in a way that 3.12 cannot read.
    """

    def __init__(self, folder: Path) -> None:
        # Before writing torch would copy on a stream of the calling thread's GPU; all is in host memory already.
        super().__init__(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@dataclasses.dataclass
class RoleFiles:
    """This rank's part in writing one role. `plan`, `write`, `finish`; the first and the last are collective."""

    folder: Path
    writer: _Writer
    planner: _Planner
    share: SavePlan
    """What this rank writes."""
    metadata: Metadata | None
    """Of the whole checkpoint, on the first rank."""
    results: list[WriteResult] = dataclasses.field(default_factory=list)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """By the files' names inside `folder`."""

    @classmethod
    def plan(cls, folder: Path, state: dict[str, Any], copy: bool) -> "RoleFiles":
        """Decide which rank writes what, and copy it to host memory. Collective; raises NotWritten on all ranks.

        Args:
            folder: the role's own.
            state: Megatron-Core's sharded state.
            copy: also copy what is in host memory already, because it will change before it is written.
        """
        sharded, common = save_preprocess(state)
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
        planner = _Planner(mcore_to_pyt_state_dict(_by_key(sharded)))
        writer = _Writer(folder)
        share, metadata = _agree_on_plan(planner, writer)
        planner.take(share.items, copy)
        return cls(folder, writer, planner, share, metadata)

    def write(self) -> None:
        """Write and sync this rank's file, and read it back for its checksum. No collectives: a thread may do it."""
        if self.share.items:
            self.results = self.writer.write_data(self.share, self.planner).wait()
        self.planner.forget()
        for name in {result.storage_data.relative_path for result in self.results}:
            self.digests[name] = digest(self.folder / name)

    def finish(self) -> None:
        """Write the files' description, once all ranks are done. Collective; raises NotWritten on all ranks."""
        gathered = _on_first_rank(self.results)
        error = None
        if self.metadata is not None:
            try:
                self.writer.finish(self.metadata, gathered)
                save_config(CheckpointingConfig(BACKEND, VERSION), str(self.folder))
            except (OSError, RuntimeError) as problem:
                error = problem
        agree(error)


def _by_key(sharded: dict[str, Any]) -> dict[str, list[ShardedBase]]:
    """What this rank writes, by its name in the checkpoint: a part on several ranks is written by one of them."""
    grouped: dict[str, list[ShardedBase]] = defaultdict(list)
    for part in nested_values(sharded):
        if is_main_replica(part.replica_id):
            grouped[part.unique_key if isinstance(part, ShardedObject) else part.key].append(part)
    return grouped


def _agree_on_plan(planner: _Planner, writer: _Writer) -> tuple[SavePlan, Metadata | None]:
    """This rank's share, and on the first rank the description of the whole. Collective."""
    plans = _on_first_rank(planner.create_local_plan())
    shares, metadata, error = None, None, None
    if dist.get_rank() == 0:
        try:
            shares, metadata = planner.create_global_plan(plans)
            shares = writer.prepare_global_plan(shares)
        except ValueError as problem:  # the parts do not make up the whole
            error = problem
    agree(error)
    box: list[Any] = [None]
    dist.scatter_object_list(box, shares)
    return planner.finish_plan(box[0]), metadata


def _on_first_rank(value: Any) -> list[Any]:
    """The values of all ranks, on the first one; nothing on the others."""
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None)
    return gathered
