"""Writing a checkpoint: aside, synced, checksummed, renamed; while the next steps run, where asked.

Megatron-Core plans which rank writes which part of a role; the files are written by a thread of each rank. Its own way
is to start processes, and those outlive a rank that is killed.
"""

import contextlib
import dataclasses
import io
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_rlhf.checkpoint import naming
from megatron_rlhf.checkpoint.integrity import META, NotWritten, agree, digest, seal, sync_tree

log = logging.getLogger(__name__)

BACKEND, VERSION = "torch_dist", 1
# Otherwise Megatron-Core starts a server process for this queue. We hand results over ourselves.
filesystem_async._results_queue = queue.Queue()


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy up to the point where files would be written."""

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret):
        self.planned = save_state_dict_ret
        return AsyncRequest(None, (), [])


@dataclasses.dataclass
class RoleFiles:
    """This rank's part in writing one role. `plan`, `write`, `finish`; the first and the last are collective."""

    folder: Path
    writer: Any
    metadata: Any
    """Of the whole checkpoint, on the first rank."""
    gathers: Any
    """torch's helper for its collectives."""
    buckets: list[Any] = dataclasses.field(default_factory=list)
    results: list[Any] = dataclasses.field(default_factory=list)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """By the files' names inside `folder`."""

    @classmethod
    def plan(cls, folder: Path, state: dict[str, Any], copy: bool) -> "RoleFiles":
        """Decide who writes what, and bring it to host memory. Collective; raises NotWritten on all ranks.

        Args:
            folder: the role's own.
            state: Megatron-Core's sharded state.
            copy: take a copy of what is in host memory already, because it is to change before it is written.
        """
        first, error = dist.get_rank() == 0, None
        sharded, common = save_preprocess(state)
        if first:
            try:
                folder.mkdir(parents=True)
                content = io.BytesIO()  # to a path, torch would write with errors that do not say "disk full"
                torch.save(common, content)
                (folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())
            except OSError as problem:
                error = problem
        agree(error)
        strategy = _Plan(BACKEND, VERSION)
        strategy.async_save(sharded, folder)
        writer, metadata, gathers = strategy.planned
        buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets)
        if copy:
            buckets = [_copied(bucket, planned) for bucket, planned in zip(buckets, writer.write_buckets, strict=True)]
        writer.write_buckets = None
        return cls(folder, writer, metadata, gathers, buckets)

    def write(self) -> None:
        """Write and sync this rank's files, and read them back for their checksums. No collectives: a thread may do it."""
        for index, bucket in enumerate(self.buckets):
            outcome: queue.SimpleQueue = queue.SimpleQueue()
            running: queue.Queue = queue.Queue()
            running.put(index)
            transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
            FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, running, use_fsync=True)
            _, result = outcome.get()
            if isinstance(result, Exception):
                raise result
            self.results.append(result)
            path = Path(bucket[0])
            self.digests[path.name] = digest(path)
        self.buckets = []

    def finish(self) -> None:
        """Write what describes the files, once all ranks have theirs. Collective; raises NotWritten on all ranks."""
        gathered = self.gathers.gather_object(list(chain.from_iterable(self.results)))
        error = None
        if dist.get_rank() == 0:
            try:
                self.writer.finish(self.metadata, gathered)
                save_config(CheckpointingConfig(BACKEND, VERSION), str(self.folder))
            except (OSError, RuntimeError) as problem:
                error = problem
        agree(error)


class Draft:
    """A checkpoint before it has its name. All methods but `write` are collective and raise NotWritten on all ranks."""

    def __init__(self, folder: Path, background: bool = False):
        """Start anew beside `folder`. `background`: the roles are copied now and written by a thread, after `start`."""
        self.folder = folder
        self.path = naming.aside(folder)
        """Where files go until `publish`."""
        self._background = background
        self._roles: list[RoleFiles] = []
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        _create(self.path)

    def add(self, name: str, state: dict[str, Any]) -> None:
        """Take in a role's sharded state: from here on the role may change."""
        role = RoleFiles.plan(self.path / name, state, copy=self._background)
        self._roles.append(role)
        if not self._background:
            self._write(role)

    def start(self) -> None:
        """Begin to write in the background."""
        assert self._background
        self._thread = threading.Thread(
            target=self._write, args=self._roles, name=f"write {self.folder.name}", daemon=True
        )
        self._thread.start()

    def is_written(self) -> bool:
        """This rank has written its files, or failed to. Not collective."""
        return self._thread is None or not self._thread.is_alive()

    def publish(self, keep_last: int = 0, keep_every: int = 0) -> None:
        """Wait until all is written, then give the checkpoint its name and delete old ones."""
        if self._thread is not None:
            self._thread.join()
        agree(self._error)
        digests: dict[str, str] = {}
        for role in self._roles:
            role.finish()
            digests |= {f"{role.folder.name}/{name}": value for name, value in role.digests.items()}
        _publish(self.path, self.folder, digests, keep_last, keep_every)

    def discard(self) -> None:
        """Take back what was written so far: it may be what fills the disk."""
        if self._thread is not None:
            self._thread.join()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.path, ignore_errors=True)
        dist.barrier()

    def _write(self, *roles: RoleFiles) -> None:
        try:
            for role in roles:
                if self._error is None:
                    role.write()
        except Exception as error:  # whatever hinders writing; `publish` tells all ranks
            self._error = error


@contextlib.contextmanager
def writing(folder: Path, keep_last: int = 0) -> Iterator[Path]:
    """Yield a folder to write into; on leaving it becomes `folder`, is named by `latest` if it is a step, and old ones go.

    Collective. An exception leaves no trace of the checkpoint.
    """
    temporary = naming.aside(folder)
    _create(temporary)
    error = None
    try:
        try:
            yield temporary
        except NotWritten:  # all ranks have it
            raise
        except OSError as problem:
            error = problem
        agree(error)
        _publish(temporary, folder, {}, keep_last, 0)
    except BaseException as problem:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(problem, NotWritten):
            dist.barrier()
        raise


def write_text(path: Path, text: str) -> None:
    """A small file, written by the first rank. Collective; raises NotWritten on all ranks."""
    on_first_rank(lambda: path.write_text(text))


def on_first_rank(write: Callable[[], object]) -> None:
    """Small files. Collective; raises NotWritten on all ranks."""
    error = None
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as problem:
            error = problem
    agree(error)


def _create(temporary: Path) -> None:
    error = None
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as problem:
            error = problem
    agree(error)


def _publish(temporary: Path, folder: Path, digests: dict[str, str], keep_last: int, keep_every: int) -> None:
    whole: list[Any] = [(temporary / META).is_file()]
    dist.broadcast_object_list(whole)
    if whole[0]:  # an exported Hugging Face folder has no use for our checksums
        seal(temporary, digests)
    error = None
    if dist.get_rank() == 0:
        try:
            if not whole[0]:
                sync_tree(temporary)
            naming.publish(temporary, folder)
        except OSError as problem:
            error = problem
    agree(error)
    if dist.get_rank() == 0:
        try:
            naming.delete_old(folder, keep_last, keep_every)
        except OSError as problem:
            log.warning("an old checkpoint could not be deleted: %s", problem)
    dist.barrier()


def _copied(bucket: Any, planned: Any) -> Any:
    """The bucket with every tensor that its role still owns replaced by a copy."""
    path, key, (bytes_data, tensor_data) = bucket
    owned = [tensor.device.type == "cpu" for _, tensor in planned[2][1]]
    pairs = zip(tensor_data, owned, strict=True)
    copies = [(item, tensor.clone() if is_owned else tensor) for (item, tensor), is_owned in pairs]
    return path, key, (bytes_data, copies)
