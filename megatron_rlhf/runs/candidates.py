"""Weights-only checkpoints to choose from, such as one per epoch: `best` points to the best, which is never deleted."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhf.checkpoint import naming
from megatron_rlhf.checkpoint.integrity import is_whole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.runs.checkpoints import CheckpointWriter
from megatron_rlhf.runs.trained import Trained

log = logging.getLogger(__name__)


def candidates(root: Path) -> list[Path]:
    """All candidates below `root`, by the step that they were saved at."""
    found = [path for path in naming.candidates(root) if is_whole(path)]
    return sorted(found, key=lambda path: (_state(path).get("step", 0), path.name))


def offer(
    writer: CheckpointWriter, name: str, roles: Sequence[Trained], state: Mapping[str, Any], keep_last: int
) -> None:
    """Save the roles' weights as `name`, let `best` point to them if none were better, and delete old ones. Collective.

    Args:
        state: `step`, and `figure`: the lower, the better.
        keep_last: candidates to keep in addition to the best; 0 keeps all.
    """
    root = writer.root
    plan: list[Any] = [None]
    if dist.get_rank() == 0:
        free, there = _free_name(root, name, state)
        plan = [(free, there, _best_figure(root))]
    dist.broadcast_object_list(plan)
    name, there, best = plan[0]
    # An existing one is from this step of this run, before it was interrupted.
    if not there and not writer.save(name, roles, state, with_optimizer=False):
        return
    if dist.get_rank() == 0:
        if math.isfinite(state["figure"]) and (best is None or state["figure"] < best):
            naming.point(root, naming.BEST, name)
        _delete_old(root, name, keep_last)
    dist.barrier()


def forget_after(root: Path, step: int) -> None:
    """A run continues from `step`: delete candidates of later steps, to be saved again; never the best. On one rank."""
    best = naming.best(root)
    for path in candidates(root):
        if _state(path).get("step", 0) > step and path != best:
            naming.remove(path)


def _free_name(root: Path, name: str, state: Mapping[str, Any]) -> tuple[str, bool]:
    """The name to save under, and whether exactly these weights are saved already: names are never used twice."""
    number, free = 1, name
    while is_whole(root / free):
        if _state(root / free) == dict(state):
            return free, True
        number += 1
        free = f"{name}_v{number}"
    return free, False


def _best_figure(root: Path) -> float | None:
    best = naming.best(root)
    return None if best is None else _state(best).get("figure")


def _delete_old(root: Path, newest: str, keep_last: int) -> None:
    if keep_last <= 0:
        return
    kept = {naming.best(root), root / newest}
    old = [path for path in candidates(root) if path.name != newest]
    try:
        for path in old[: max(len(old) - (keep_last - 1), 0)]:
            if path not in kept:
                naming.remove(path)
    except OSError as problem:
        log.warning("an old checkpoint could not be deleted: %s", problem)


def _state(path: Path) -> dict[str, Any]:
    try:
        return naming.read_meta(path)["state"]
    except (UserError, KeyError):
        return {}
