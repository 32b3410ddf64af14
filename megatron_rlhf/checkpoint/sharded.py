"""Save and load roles with Megatron-Core's distributed checkpoints; a checkpoint is whole or it is not there.

A checkpoint is a folder `step_N` with one folder per role (`policy`, `policy_ema`, `value`, `reward`), `meta.json` (the
models' shapes and the trainer's own state) and `checksums.sha256`. It is written under another name and renamed, so a
partial one is never picked up. How files are written is in `role_files` and `draft`, how they are named in `naming`,
how damage is found in `integrity`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_rlhf.checkpoint import restricted
from megatron_rlhf.checkpoint.description import adapter_from_json, model_from_json, model_to_json, write_description
from megatron_rlhf.checkpoint.draft import Draft, writing
from megatron_rlhf.checkpoint.integrity import META, NotWritten, agree
from megatron_rlhf.checkpoint.naming import FORMAT, find_checkpoint, latest, point, read_meta
from megatron_rlhf.checkpoint.role_files import RoleFiles
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.models.adapters import is_adapter
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.collectives import device, publish_object
from megatron_rlhf.parallel.layout import ParallelLayout

__all__ = [
    "FORMAT",
    "META",
    "Draft",
    "NotWritten",
    "SavedRole",
    "adapter_from_json",
    "find_checkpoint",
    "latest",
    "layout_signature",
    "load_role",
    "load_weights",
    "model_from_json",
    "model_to_json",
    "point",
    "read_meta",
    "require_plain",
    "save_role",
    "state_to_save",
    "write_description",
    "write_meta",
    "writing",
]


@dataclasses.dataclass
class SavedRole:
    """The parts of a role that go into a checkpoint."""

    role: Role
    optimizer: MegatronOptimizer | None = None


def save_role(folder: Path, saved: SavedRole) -> None:
    """Write one role's weights, and, where it is trained, its optimizer's state and random state.

    Collective; raises NotWritten on all ranks.
    """
    role = RoleFiles.plan(folder / saved.role.name, state_to_save(saved), copy=False)
    error = None
    try:
        role.write()
    except (OSError, RuntimeError) as problem:
        error = problem
    agree(error)
    role.finish()


def state_to_save(saved: SavedRole) -> dict[str, Any]:
    """Megatron-Core's sharded state of a role. It refers to the role's own tensors. Collective."""
    layout = saved.role.layout
    with layout:
        return _known_to_all(_sharded_state(saved, is_loading=False) if layout.is_member else {}, layout)


def write_meta(folder: Path, roles: Mapping[str, Role], state: Mapping[str, Any], tokenizer: str | None = None) -> None:
    """`meta.json`, last: shapes of the roles, layouts, the trainer's state (JSON), and the tokenizer's fingerprint."""
    described = {name: (role.model, role.scalar, layout_signature(role)) for name, role in roles.items()}
    write_description(folder, described, state, tokenizer, {name: role.adapter for name, role in roles.items()})


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
        _leave_out_unsaved_extra_state([state[key] for key in _keyed(saved.role) if key in state], folder / name)
        loaded = _load(state, folder / name)
        for key, chunk in _keyed(saved.role).items():
            missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
            assert not unexpected and all(map(_is_extra_state, missing)), (missing, unexpected)
        if saved.optimizer is not None:
            _load_optimizer(saved.optimizer, loaded["optimizer"])
        if "random" in loaded:
            _restore_random_state(loaded["random"])


def load_weights(folder: Path, role: Role, from_role: str, keep_head: bool = False) -> None:
    """Fill a role's weights from another role's, saved at any layout; `keep_head` leaves its scalar head alone. Collective.

    Adapters that the checkpoint does not have stay as they are.
    """
    keep_adapters = "adapter" not in read_meta(folder)["roles"][from_role]

    def stays(name: str) -> bool:
        return (keep_head and _is_head(name)) or (keep_adapters and is_adapter(name))

    with role.layout:
        state = _sharded_state(SavedRole(role), is_loading=True) if role.layout.is_member else {}
        # Extra state is the scaling history of fp8, not weights, and an imported model has none.
        for part in state.values():
            for name in [n for n in part if _is_extra_state(n) or stays(n)]:
                del part[name]
        loaded = _load(state, folder / from_role)
        for key, chunk in _keyed(role).items():
            missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
            assert not unexpected and all(stays(name) or _is_extra_state(name) for name in missing), missing


_DEVICE, _OPTIMIZER = " x device ", " x distributed optimizer "


def layout_signature(role: Role) -> str:
    """Layouts with the same signature draw the same random numbers on the same ranks."""
    parallel = role.layout.config
    stages = f"{role.layout.describes} x virtual {parallel.virtual_stages} x sequence {parallel.sequence}"
    return f"{stages}{_DEVICE}{device().type}{_OPTIMIZER}{parallel.distributed_optimizer}"


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
    signature = layout_signature(role)
    written = read_meta(folder)["roles"].get(name, {}).get("layout")
    return written in (
        signature,
        signature.replace(f"{_DEVICE}cpu", ""),
    )  # early versions named no device: they ran on CPUs only


def _keyed(role: Role) -> dict[str, Any]:
    # Megatron-Core's convention for the keys of one or several chunks; its optimizers rely on it.
    chunks = role.modules
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _is_head(name: str) -> bool:
    return name.startswith("output_layer.")


def require_plain(folder: Path, roles: Iterable[str]) -> None:
    """Raise UserError, on all ranks, for a checkpoint that holds code, before it is loaded. Collective."""
    refusal: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            for role in roles:
                restricted.load_metadata(folder / role)
                restricted.require_plain_common(folder / role)
        except UserError as error:
            refusal = [str(error)]
    dist.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise UserError(refusal[0])


def _is_extra_state(name: str) -> bool:
    """What Transformer Engine's layers keep in addition to weights: their fp8 scales, which they determine again."""
    return name.endswith("_extra_state")


def _leave_out_unsaved_extra_state(parts: list[dict[str, Any]], source: Path) -> None:
    """The checkpoint's machine may have had no Transformer Engine, and no fp8."""
    written = restricted.load_metadata(source).state_dict_metadata
    for part in parts:
        for name in [n for n, entry in part.items() if _is_extra_state(n) and entry.unique_key not in written]:
            del part[name]


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Torch's Adam, Apex's and Transformer Engine's have settings of their own in their groups.

    Where the saved groups come from another one and lack some settings, these stay as they are.
    """
    own = [dict(group) for part in optimizer.chained_optimizers for group in part.param_groups]
    optimizer.load_state_dict(state)
    groups = [group for part in optimizer.chained_optimizers for group in part.param_groups]
    for group, settings in zip(groups, own, strict=True):
        for key, value in settings.items():
            group.setdefault(key, value)


def _load(state: dict[str, Any], source: Path) -> dict[str, Any]:
    require_plain(source.parent, [source.name])
    try:
        loaded = dist_checkpointing.load(state, str(source), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    except CheckpointException as exception:
        raise restricted.user_error_in(exception) or exception from None
    for key, part in loaded.items():
        if key.startswith("model"):
            restricted.require_plain_scales(part, str(source))
    return loaded


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
        if saved.role.trains_some_layers:
            state["optimizer"] = dict_list_map_inplace(_by_layer, state["optimizer"])
        if with_random:
            ranks = saved.role.layout.ranks
            random = None if is_loading else _random_state()
            state["random"] = ShardedObject(
                "random", random, (len(ranks),), (dist.get_rank() - ranks.start,), replica_id=0
            )
    return state


def _by_layer(part: Any) -> Any:
    """A tensor that is stacked over layers under its own layer's name: a stack would have to hold all layers."""
    if isinstance(part, ShardedTensorFactory):
        build = part.build_fn
        return dataclasses.replace(part, build_fn=lambda *args: dict_list_map_inplace(_by_layer, build(*args)))
    if not isinstance(part, ShardedTensor) or part.prepend_axis_num == 0:
        return part
    names = {"global_shape", "global_offset", "axis_fragmentations"}
    changes: dict[str, Any] = {name: value[1:] for name in names if (value := getattr(part, name)) is not None}
    key = part.key.replace("layers.", f"layers.{part.global_offset[0]}.")
    return dataclasses.replace(part, key=key, prepend_axis_num=part.prepend_axis_num - 1, **changes)


def _random_state() -> dict[str, Any]:
    return {"default": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.cuda.set_rng_state(state["default"])
    get_cuda_rng_tracker().set_states(state["tracker"])
