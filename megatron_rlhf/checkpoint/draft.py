"""Writing a checkpoint: under another name, synced, checksummed, then renamed; in the background where asked."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhf.checkpoint import naming
from megatron_rlhf.checkpoint.integrity import META, NotWritten, agree, seal, sync_tree
from megatron_rlhf.checkpoint.role_files import RoleFiles, ToWrite
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.parallel import collectives

log = logging.getLogger(__name__)


class Draft:
    """A checkpoint before it has its name. All methods but `write` are collective and raise NotWritten on all ranks."""

    def __init__(self, folder: Path, background: bool = False):
        """Start from scratch beside `folder`. `background`: copy roles now; a thread writes them after `start`."""
        self.folder = folder
        self.path = naming.aside(folder)
        """Where files are written until `publish`."""
        self._background = background
        self._roles: list[RoleFiles] = []
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        _create(self.path)

    def add(self, name: str, state: ToWrite) -> None:
        """Add what this rank writes of a role: from here on the role may change."""
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
        """Delete what was written so far: it may be what fills the disk."""
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
        except Exception as error:  # anything that prevents writing; `publish` tells all ranks
            self._error = error


@contextlib.contextmanager
def writing(folder: Path, keep_last: int = 0) -> Iterator[Path]:
    """Yield a folder to write into; on exit it becomes `folder`, `latest` points to it if it is a step, old ones go.

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


def on_each_rank(write: Callable[[], object]) -> None:
    """What each rank writes of what it reads. Collective; raises NotWritten, or UserError for what cannot be read, on all
    ranks.
    """
    mistake, error = None, None
    try:
        write()
    except UserError as problem:
        mistake = str(problem)
    except (OSError, RuntimeError) as problem:  # torch's for a full disk
        error = problem
    if (first := collectives.first_message(mistake)) is not None:
        raise UserError(first[1])
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
    if whole[0]:  # an exported Hugging Face folder does not need checksums
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
