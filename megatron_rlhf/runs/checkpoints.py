"""When checkpoints are written, what happens when they cannot be, and which one a run continues from."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint import integrity, naming, sharded
from megatron_rlhf.checkpoint.draft import Draft, on_first_rank
from megatron_rlhf.checkpoint.integrity import NotWritten
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.runs.trained import Trained

log = logging.getLogger(__name__)


class SavedTokenizer(Protocol):
    """The tokenizer that a run's models are trained with."""

    @property
    def fingerprint(self) -> str:
        """Differs between different tokenizers."""

    def save(self, path: Path) -> None:
        """Write a folder from which it can be loaded."""


class CheckpointWriter:
    """Writes below `root`, one checkpoint at a time, now or in the background. All methods are collective.

    A checkpoint that cannot be written is not a reason to stop: the run logs it and continues; the last good one stays.
    """

    def __init__(self, root: Path, config: RunConfig, on_saved: Callable[[], object]):
        """`on_saved` is called on the first rank after each checkpoint."""
        self.root = root
        self._config = config
        self._on_saved = on_saved
        self._draft: Draft | None = None
        """The checkpoint that is being written."""
        self.tokenizer: SavedTokenizer | None = None
        """Stored in every checkpoint."""

    def save(self, name: str, roles: Sequence[Trained], state: Mapping[str, Any], with_optimizer: bool = True) -> bool:
        """Write `name` with the roles, their averages, and the trainer's state; returns whether it worked."""
        self.finish()
        try:
            self._draft = Draft(self.root / name)
            self._fill(self._draft, roles, state, with_optimizer)
        except NotWritten as error:
            self._give_up(name, error)
            return False
        return self.finish()

    def save_in_background(self, name: str, roles: Sequence[Trained], state: Mapping[str, Any]) -> None:
        """Copy the state as it is now; it is written while the next steps run, and published after one of them."""
        self.finish()
        try:
            self._draft = Draft(self.root / name, background=True)
            self._fill(self._draft, roles, state, with_optimizer=True)
            self._draft.start()
        except NotWritten as error:
            self._give_up(name, error)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._draft is not None

    def publish_if_written(self) -> None:
        """Give the checkpoint in the background its name, if every rank has written its part."""
        if self._draft is not None:
            written = torch.tensor(int(self._draft.is_written()), device=collectives.device())
            dist.all_reduce(written, op=dist.ReduceOp.MIN)
            if written:
                self.finish()

    def finish(self) -> bool:
        """Wait for the checkpoint being written, if any, and give it its name. Returns whether that worked."""
        if self._draft is None:
            return True
        try:
            self._draft.publish(self._config.keep_last, self._config.keep_every)
        except NotWritten as error:
            self._give_up(self._draft.folder.name, error)
            return False
        self._draft = None
        if dist.get_rank() == 0:
            try:
                self._on_saved()
            except OSError as error:
                log.warning("after a checkpoint: %s", error)
        return True

    def _fill(self, draft: Draft, roles: Sequence[Trained], state: Mapping[str, Any], with_optimizer: bool) -> None:
        shapes: dict[str, Role] = {}
        for trained in roles:
            parts = [SavedRole(trained.role, trained.optimizer if with_optimizer else None)]
            if trained.average is not None:
                parts.append(trained.average.saved())
            for saved in parts:
                draft.add(saved.role.name, sharded.state_to_save(saved))
                shapes[saved.role.name] = saved.role
        tokenizer = self.tokenizer
        if tokenizer is not None:
            on_first_rank(lambda: tokenizer.save(draft.path / naming.TOKENIZER))
        sharded.write_meta(draft.path, shapes, state, None if tokenizer is None else tokenizer.fingerprint)

    def _give_up(self, name: str, error: NotWritten) -> None:
        """Log that the checkpoint failed, and delete what was written of it: it may be what fills the disk."""
        if self._draft is not None:
            self._draft.discard()
            self._draft = None
        free = shutil.disk_usage(self.root.parent).free / 1e9
        newest = sharded.latest(self.root)
        stays = f"the last good checkpoint, {newest.name}, stays" if newest else "there is none yet"
        log.warning(
            "checkpoint %s could not be written: %s (%.3f GB free); %s; the run goes on", name, error, free, stays
        )


def choose_checkpoint(root: Path, config: RunConfig) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint to continue from, and those skipped because they are damaged: name -> what is wrong. Collective.

    Raises:
        UserError: the folder holds a different run, nothing to resume, or a checkpoint with code in it.
    """
    if not (config.resume or config.auto_resume):
        if naming.newest_first(root) or naming.candidates(root):
            raise UserError(
                f"run.dir={config.dir} holds another run: choose a new folder, or go on with run.resume=true"
            )
        return None, {}
    damaged: dict[str, str] = {}
    for candidate in naming.newest_first(root):
        problem = integrity.find_damage(candidate)
        if problem is None:
            sharded.require_plain(candidate, sharded.read_meta(candidate)["roles"])
            return candidate, damaged
        damaged[candidate.name] = problem
    if damaged:
        named = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        raise UserError(f"no checkpoint in {root} is undamaged ({named}): repair one, or choose a new run.dir")
    if config.resume:
        raise UserError(f"run.resume=true, but {root} holds no checkpoint to go on from")
    return None, {}
