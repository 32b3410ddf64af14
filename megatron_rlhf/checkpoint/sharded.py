"""Save and load roles with Megatron-Core's distributed checkpoints; a checkpoint is whole or it is not there.

A checkpoint is a folder `step_N` with one folder per role (`policy`, `policy_ema`, `value`, `reward`), `meta.json` (the
models' shapes and the trainer's own state) and `checksums.sha256`. It is written under another name and renamed, so a
partial one is never picked up. How files are written is in `role_files` and `draft`, how they are named in `naming`,
how damage is found in `integrity`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_rlhf.checkpoint import restricted
from megatron_rlhf.checkpoint.description import adapter_from_json, model_from_json, model_to_json, write_description
from megatron_rlhf.checkpoint.draft import Draft, on_each_rank, writing
from megatron_rlhf.checkpoint.integrity import META, NotWritten
from megatron_rlhf.checkpoint.naming import FORMAT, find_checkpoint, latest, point, read_meta
from megatron_rlhf.checkpoint.reading import RoleReader
from megatron_rlhf.checkpoint.role_files import RoleFiles, ToWrite
from megatron_rlhf.checkpoint.role_state import RoleState, SavedRole, restore_random_state
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.models.adapters import is_adapter
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.collectives import device, first_message, publish_object

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


def save_role(folder: Path, saved: SavedRole) -> None:
    """Write one role's weights, and, where it is trained, its optimizer's state and random state.

    Collective; raises NotWritten on all ranks.
    """
    role = RoleFiles.plan(folder / saved.role.name, state_to_save(saved), copy=False)
    on_each_rank(role.write)
    role.finish()


def state_to_save(saved: SavedRole) -> ToWrite:
    """What this rank writes of a role. It refers to the role's own tensors. Collective."""
    layout, state = saved.role.layout, ToWrite()
    if layout.is_member:
        with layout:
            state = ToWrite(*RoleState(saved, is_loading=False).to_write())
    # The first rank of the world writes what is common, also for a role that lives on other ranks.
    state.common = publish_object(state.common, layout)
    return state


def write_meta(folder: Path, roles: Mapping[str, Role], state: Mapping[str, Any], tokenizer: str | None = None) -> None:
    """`meta.json`, last: shapes of the roles, layouts, the trainer's state (JSON), and the tokenizer's fingerprint."""
    described = {name: (role.model, role.scalar, layout_signature(role)) for name, role in roles.items()}
    write_description(folder, described, state, tokenizer, {name: role.adapter for name, role in roles.items()})


def load_role(folder: Path, saved: SavedRole) -> None:
    """Fill a role (or its average), its optimizer and, at the layout that saved it, its random state. Collective."""
    name = saved.role.name
    _require_same_optimizer(folder, name, saved)
    require_plain(folder, [name])
    if not saved.role.layout.is_member:
        _read(None, folder / name)
        return
    with saved.role.layout:
        state = RoleState(saved, is_loading=True, with_random=_same_layout(folder, name, saved.role))
        objects, common = _read(state, folder / name)
        for chunk, entries in zip(saved.role.modules, state.model, strict=True):
            extra = {n: objects[key] for n, e in entries.items() if (key := getattr(e, "unique_key", None)) in objects}
            restricted.require_plain_scales(extra, str(folder / name))
            if extra:
                chunk.load_state_dict(extra, strict=False)
        if saved.optimizer is not None:
            _load_optimizer(saved.optimizer, state.loaded_optimizer(common))
        if state.random_key in objects:
            restore_random_state(objects[state.random_key])


def load_weights(folder: Path, role: Role, from_role: str, keep_head: bool = False) -> None:
    """Fill a role's weights from another role's, saved at any layout; `keep_head` leaves its scalar head alone. Collective.

    Adapters that the checkpoint does not have stay as they are.
    """
    keep_adapters = "adapter" not in read_meta(folder)["roles"][from_role]

    def stays(name: str) -> bool:
        # Extra state is the scaling history of fp8, not weights, and an imported model has none.
        return _is_extra_state(name) or (keep_head and _is_head(name)) or (keep_adapters and is_adapter(name))

    require_plain(folder, [from_role])
    if not role.layout.is_member:
        _read(None, folder / from_role)
        return
    with role.layout:
        _read(RoleState(SavedRole(role), is_loading=True, without=stays), folder / from_role)


def _read(state: RoleState | None, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the memory of a role; returns its objects and what is common. Collective, also for ranks without the role."""
    objects, common, problem = {}, {}, None
    if state is not None:
        try:
            reader = RoleReader(folder)
            objects, common = reader.objects(state.objects), reader.common()
            reader.read_into(state.to_read())
        except UserError as error:
            problem = str(error)
    if (first := first_message(problem)) is not None:
        raise UserError(first[1])
    if state is not None:
        state.exchange()
    return objects, common


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


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Torch's Adam, Apex's and Transformer Engine's have settings of their own in their groups.

    Where the saved groups come from another one and lack some settings, these stay as they are.
    """
    own = [dict(group) for part in optimizer.chained_optimizers for group in part.param_groups]
    # Other versions of this package wrote how the state was sharded, and Megatron-Core would look for it here.
    state = {key: value for key, value in state.items() if key not in ("param_state", "param_state_sharding_type")}
    # Megatron-Core 0.19 knows a group by its peak rate, too, which a resume may change.
    for saved in _saved_groups(state):
        saved.update({key: own[0].get(key) for key in ("max_lr", "min_lr") if key in saved})
    optimizer.load_state_dict(state)
    groups = [group for part in optimizer.chained_optimizers for group in part.param_groups]
    for group, settings in zip(groups, own, strict=True):
        for key, value in settings.items():
            group.setdefault(key, value)


def _saved_groups(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of each group of weights, wherever an optimizer's state has them."""
    for key, value in state.items():
        if key == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _saved_groups(value)
