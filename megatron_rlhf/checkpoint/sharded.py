"""Save and load roles with Megatron-Core's distributed checkpoints; a checkpoint is whole or it is not there.

A checkpoint is a folder `step_N` with one folder a role (`policy`, `policy_ema`, `value`, `reward`) and `meta.json`: the
models' shapes and the trainer's own state. It is written aside and renamed, so a torn one is never picked up.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, Positions, RopeScaling
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.collectives import publish_object
from megatron_rlhf.parallel.layout import ParallelLayout

log = logging.getLogger(__name__)

META = "meta.json"
FORMAT = 1
_ENUMS: dict[str, type[Enum]] = {
    "positions": Positions,
    "rope_scaling": RopeScaling,
    "norm": Norm,
    "activation": Activation,
}


@dataclasses.dataclass
class SavedRole:
    """What of a role goes into a checkpoint."""

    role: Role
    optimizer: MegatronOptimizer | None = None


@contextlib.contextmanager
def writing(folder: Path, keep_last: int = 0) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into; on leaving it becomes `folder`, is named by `latest`, and old ones go.

    Collective. An exception leaves no trace of the checkpoint.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        yield temporary
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    dist.barrier()
    if first:
        _publish(temporary, folder)
        _delete_old(folder.parent, keep_last, folder)
    dist.barrier()


def save_role(folder: Path, saved: SavedRole) -> None:
    """Write one role's weights, and its optimizer's state and random state where it is trained. Collective."""
    target = folder / saved.role.name
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    layout = saved.role.layout
    with layout:
        state = _sharded_state(saved, is_loading=False) if layout.is_member else {}
        dist_checkpointing.save(_known_to_all(state, layout), str(target))


def write_meta(folder: Path, roles: Mapping[str, Role], state: Mapping[str, Any]) -> None:
    """`meta.json`, last: shapes of the roles, layouts, and the trainer's state (JSON)."""
    write_description(
        folder, {name: (role.model, role.scalar, layout_signature(role)) for name, role in roles.items()}, state
    )


def write_description(
    folder: Path, roles: Mapping[str, tuple[ModelConfig, bool, str]], state: Mapping[str, Any]
) -> None:
    """`write_meta` for roles that are not in memory: shape, whether it has a scalar head, and layout of each. Collective."""
    if dist.get_rank() == 0:
        content = {
            "format": FORMAT,
            "roles": {
                name: {"model": model_to_json(model), "scalar": scalar, "layout": layout}
                for name, (model, scalar, layout) in roles.items()
            },
            "state": dict(state),
        }
        (folder / META).write_text(json.dumps(content, indent=1))
    dist.barrier()


def _known_to_all(state: dict[str, Any], layout: ParallelLayout) -> dict[str, Any]:
    """What is not sharded is written by the first rank of the world, also for a role that lives on other ranks."""
    if layout.spans_world:
        return state
    common = publish_object(extract_sharded_base(state)[1], layout)
    return state if layout.is_member else common


def load_role(folder: Path, saved: SavedRole) -> None:
    """Fill a role, its optimizer and (at the layout that saved it) its random state. Collective."""
    name = saved.role.name
    _require_same_optimizer(folder, name, saved)
    with saved.role.layout:
        same = _same_layout(folder, name, saved.role)
        state = _sharded_state(saved, is_loading=True, with_random=same) if saved.role.layout.is_member else {}
        loaded = _load(state, folder / name)
        for key, chunk in _keyed(saved.role).items():
            chunk.load_state_dict(loaded[key], strict=True)
        if saved.optimizer is not None:
            saved.optimizer.load_state_dict(loaded["optimizer"])
        if "random" in loaded:
            _restore_random_state(loaded["random"])


def load_weights(folder: Path, role: Role, from_role: str, keep_head: bool = False) -> None:
    """Fill a role's weights from another role's, saved at any layout; `keep_head` leaves its scalar head alone. Collective."""
    with role.layout:
        state = _sharded_state(SavedRole(role), is_loading=True) if role.layout.is_member else {}
        # Extra state is the scaling history of fp8, not weights, and an imported model has none.
        for part in state.values():
            for name in [n for n in part if n.endswith("_extra_state") or (keep_head and _is_head(n))]:
                del part[name]
        loaded = _load(state, folder / from_role)
        for key, chunk in _keyed(role).items():
            missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
            assert not unexpected and all(_is_head(name) or name.endswith("_extra_state") for name in missing), missing


def find_checkpoint(path: str | Path, key: str) -> Path:
    """The checkpoint folder that a user means: a step folder itself, or the best or else the newest one of a run folder.

    Raises:
        UserError: naming `key`, when the path holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{key}={path}: no such folder")
    if (path / META).is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = _pointed(root, "best") or latest(root)
    if newest is None:
        raise UserError(
            f"{key}={path} is neither a checkpoint ({META}), nor a run folder with checkpoints/, nor a Hugging Face "
            "folder (config.json)"
        )
    return newest


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`: the one `latest` names, else the highest step."""
    whole = [step for step in _steps(root) if (step / META).is_file()]
    return _pointed(root, "latest") or (whole[-1] if whole else None)


def point(root: Path, name: str, target: str) -> None:
    """Make `root/name` name the checkpoint `target`: replaced in one step, never half-written. Call it on one rank."""
    aside = root / f".{name}.writing"
    aside.write_text(target)
    aside.replace(root / name)


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint, checked for its format."""
    try:
        meta = json.loads((folder / META).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / META}:{error.lineno}: broken JSON: {error.msg}") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder / META}: format {meta.get('format')}, this version reads format {FORMAT}")
    return meta


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(model).items()}


def model_from_json(content: Mapping[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {k: _ENUMS[k](v) if k in _ENUMS else v for k, v in content.items()}
    return ModelConfig(**fields)


_OPTIMIZER = " x distributed optimizer "


def layout_signature(role: Role) -> str:
    """Layouts with the same signature draw the same random numbers on the same ranks."""
    parallel = role.layout.config
    stages = f"{role.layout.describes} x virtual {parallel.virtual_stages} x sequence {parallel.sequence}"
    return f"{stages}{_OPTIMIZER}{parallel.distributed_optimizer}"


def _require_same_optimizer(folder: Path, name: str, saved: SavedRole) -> None:
    # Megatron-Core's two kinds of optimizer state do not load into each other.
    signature = read_meta(folder)["roles"].get(name, {}).get("layout", "")
    written, wanted = (text.rpartition(_OPTIMIZER)[2] for text in (signature, layout_signature(saved.role)))
    if saved.optimizer is not None and written != wanted:
        raise UserError(
            f"distributed_optimizer={wanted} of {name}'s layout: {folder} was saved with {written}, and the two kinds of "
            f"optimizer state do not convert; resume with {written}, or start a new run from these weights with init_from"
        )


def _same_layout(folder: Path, name: str, role: Role) -> bool:
    return read_meta(folder)["roles"].get(name, {}).get("layout") == layout_signature(role)


def _keyed(role: Role) -> dict[str, Any]:
    # Megatron-Core's convention for the keys of one and of several chunks; its optimizers rely on it.
    chunks = role.modules
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _is_head(name: str) -> bool:
    return name.startswith("output_layer.")


def _load(state: dict[str, Any], source: Path) -> dict[str, Any]:
    return dist_checkpointing.load(state, str(source), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


def _sharded_state(saved: SavedRole, is_loading: bool, with_random: bool = True) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": saved.role.layout.groups.dp_cp,
    }
    state: dict[str, Any] = {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _keyed(saved.role).items()
    }
    if saved.optimizer is not None:
        state["optimizer"] = saved.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
        if with_random:
            ranks = saved.role.layout.ranks
            random = None if is_loading else _random_state()
            state["random"] = ShardedObject(
                "random", random, (len(ranks),), (dist.get_rank() - ranks.start,), replica_id=0
            )
    return state


def _random_state() -> dict[str, Any]:
    return {"default": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.cuda.set_rng_state(state["default"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _pointed(root: Path, name: str) -> Path | None:
    if not (root / name).is_file():
        return None
    target = root / (root / name).read_text().strip()
    return target if (target / META).is_file() else None


def _steps(root: Path) -> list[Path]:
    found = [(int(m.group(1)), p) for p in root.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def _publish(temporary: Path, folder: Path) -> None:
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    if folder.name.startswith("step_"):
        point(folder.parent, "latest", folder.name)


def _delete_old(root: Path, keep_last: int, newest: Path) -> None:
    if keep_last > 0 and newest.name.startswith("step_"):
        for old in _steps(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
