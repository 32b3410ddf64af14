"""Which part of a role trains, by its configuration, checked before any model is built."""

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import Adapter, LoraConfig, selects
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.stages import BaseConfig, PPOConfig
from megatron_rlhf.config.training import TrainedRoleConfig
from megatron_rlhf.conversion.architecture import tensor_shapes
from megatron_rlhf.conversion.starting_point import StartingPoint
from megatron_rlhf.conversion.whole_tensors import places

HEAD = "output_layer"
"""The scalar head, which always trains."""


def lora_of(config: BaseConfig, name: str) -> LoraConfig:
    """A role's adapters; none where it does not train."""
    role = getattr(config, name, None)
    return role.lora if isinstance(role, TrainedRoleConfig) else LoraConfig()


def patterns_of(config: BaseConfig, name: str, scalar: bool) -> list[str]:
    """What of a role's own weights trains; empty: all."""
    role = getattr(config, name, None)
    chosen = role.trainable if isinstance(role, TrainedRoleConfig) else []
    return [*chosen, HEAD] if chosen and scalar else chosen


def check(
    name: str,
    config: BaseConfig,
    model: ModelConfig,
    source: StartingPoint | None,
    scalar: bool,
    key: str | None = None,
) -> None:
    """Raise UserError for adapters that the model or its starting point does not have, and for patterns without a match.

    Args:
        key: of the starting point.
    """
    patterns, lora = patterns_of(config, name, scalar), lora_of(config, name)
    weights = [str(place) for place in places(tensor_shapes(model, scalar), model.num_layers)]
    for pattern in patterns:
        if not any(selects(pattern, weight) for weight in weights):
            raise UserError(
                f"{name}.trainable: {pattern} matches no weight of this model; it has layers.0-{model.num_layers - 1}, and "
                f"weights such as {weights[0]}, {weights[-1]}"
            )
    adapter = lora.adapter(model, f"{name}.lora")
    if adapter is None:
        if lora != LoraConfig():
            raise UserError(f"{name}.lora needs {name}.lora.rank, without which there are no adapters")
        return
    if patterns:
        raise UserError(
            f"{name}.trainable and {name}.lora.rank={lora.rank}: adapters train while all else is frozen; give one"
        )
    if isinstance(config, PPOConfig) and name == "policy" and config.offload.reference:
        raise UserError(
            "offload.reference=true with policy.lora: the reference is the policy's own frozen weights, there is no copy to "
            "move; leave it out"
        )
    if source is not None and source.adapter is not None:
        _require_same(adapter, source.adapter, name, key or f"{name}.init_from", source)


def _require_same(wanted: Adapter, found: Adapter, name: str, key: str, source: StartingPoint) -> None:
    where = source.peft.folder if source.peft else source.path
    for field in ("rank", "alpha", "targets"):
        pair = getattr(wanted, field), getattr(found, field)
        if pair[0] != pair[1]:
            shown = [f"[{','.join(value)}]" if isinstance(value, tuple) else f"{value:g}" for value in pair]
            raise UserError(
                f"{name}.lora.{field}={shown[0]}: the adapters that {key} brings ({where}) have {shown[1]}; set it to that to "
                "train them further, or merge them first (docs/lora.md)"
            )
