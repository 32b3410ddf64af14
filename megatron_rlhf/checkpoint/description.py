"""`meta.json`: what a checkpoint says of itself. Shapes of the roles, their layouts and adapters, the trainer's state."""

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint.draft import write_text
from megatron_rlhf.checkpoint.integrity import META
from megatron_rlhf.checkpoint.naming import FORMAT
from megatron_rlhf.config.checking.ranges import check_ranges
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, Positions, RopeScaling

_ENUMS: dict[str, type[Enum]] = {
    "positions": Positions,
    "rope_scaling": RopeScaling,
    "norm": Norm,
    "activation": Activation,
}


def write_description(
    folder: Path,
    roles: Mapping[str, tuple[ModelConfig, bool, str]],
    state: Mapping[str, Any],
    tokenizer: str | None = None,
    adapters: Mapping[str, Adapter | None] | None = None,
) -> None:
    """`write_meta` for roles that are not in memory: shape, whether it has a scalar head, and layout of each. Collective."""
    adapted = {name: {"adapter": a.to_json()} for name, a in (adapters or {}).items() if a is not None}
    content = {
        "format": FORMAT,
        "roles": {
            name: {"model": model_to_json(model), "scalar": scalar, "layout": layout, **adapted.get(name, {})}
            for name, (model, scalar, layout) in roles.items()
        },
        "tokenizer": tokenizer,
        "state": dict(state),
    }
    write_text(folder / META, json.dumps(content, indent=1))


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(model).items()}


def model_from_json(content: Mapping[str, Any]) -> ModelConfig:
    try:
        fields: dict[str, Any] = {k: _ENUMS[k](v) if k in _ENUMS else v for k, v in content.items()}
        model = ModelConfig(**fields)
        check_ranges(model)
    except (TypeError, ValueError, UserError) as error:  # written by hand, or by another version
        raise UserError(f"{META}: not a model's shape as this version knows it: {error}") from error
    return model


def adapter_from_json(content: Mapping[str, Any] | None) -> Adapter | None:
    """A role's adapters, of which `None` says that it has none."""
    try:
        return Adapter.from_json(content)
    except (TypeError, KeyError) as error:
        raise UserError(f"{META}: not adapters as this version knows them: {error}") from error
