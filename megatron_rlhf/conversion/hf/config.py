"""config.json <-> ModelConfig, by the table of the architecture."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rlhf.config.checking.ranges import check_ranges, range_of
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, Positions, RopeScaling, without_implied
from megatron_rlhf.conversion import key_maps
from megatron_rlhf.conversion.architecture import Architecture, Head, attention_shape

# Our fields about rotary positions; all architectures write them the same way.
_ROPE_FIELDS = {field.name for field in fields(ModelConfig) if field.name.startswith("rope_")}
# Of these, the keys in config.json, beside that of the base.
_ROPE_KEYS = {
    "rope_fraction": "partial_rotary_factor",
    "rope_scaling_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_low_frequency": "low_freq_factor",
    "rope_high_frequency": "high_freq_factor",
}
# Fields that change no output, so config.json does not need them.
_FREE = {"vocab_multiple", "init_std"}
# Keys of any config.json -> the values with which the model is causal and not quantized.
_ONLY: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "is_causal": (None, True)}


def find_architecture(content: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a config.json names; UserError when it cannot be converted."""
    model_type = content.get("model_type")
    if model_type in key_maps.names():
        return key_maps.load(str(model_type))
    known = ", ".join(key_maps.names())
    reason = key_maps.REFUSED.get(str(model_type))
    because = f" ({reason}: not supported)" if reason else ""
    raise UserError(f"{where}: model_type={model_type} cannot be converted{because}; these can: {known}")


def read_head(content: Mapping[str, Any], architecture: Architecture, where: str) -> Head:
    """The head of the class that config.json names; the base model alone counts as a language model."""
    classes = content.get("architectures") or [architecture.class_name(Head.language)]
    by_name = {architecture.class_name(head): head for head in Head if architecture.head_module(head) is not None}
    by_name[f"{architecture.classes}Model"] = Head.language
    head = next((by_name[name] for name in classes if name in by_name), None)
    if head is None:
        raise UserError(f"{where}: architectures={classes} is none of {', '.join(by_name)}")
    labels = len(content["id2label"]) if content.get("id2label") else content.get("num_labels") or 2
    if head is not Head.language and labels != 1:
        raise UserError(f"{where}: {classes[0]} has {labels} labels; a reward or value model has num_labels=1")
    return head


def to_model_config(content: Mapping[str, Any], architecture: Architecture, where: str) -> ModelConfig:
    """The shape that a config.json describes; UserError for what our modules do not support."""
    _require_sizes(content, architecture, where)
    full = _with_defaults(content, architecture, where)
    for key, allowed in (_ONLY | dict(architecture.only)).items():
        if full.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}={full[key]} is not supported, only {' or '.join(map(str, allowed))}")
    windows = sorted({kind for kind in full.get("layer_types") or [] if kind != "full_attention"})
    if windows:
        raise UserError(f"{where}: layer_types={', '.join(windows)} is not supported, only full_attention")
    values = dict(architecture.fixed)
    for name, keys in architecture.fields.items():
        keys = (keys,) if isinstance(keys, str) else keys
        found = {key: full.get(key) for key in keys}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{key}={value}" for key, value in found.items())
            raise UserError(f"{where}: {listed}: not supported unless they agree")
        values[name] = found[keys[0]]
    name = full[architecture.activation_key]
    values["activation"] = next(
        (activation for activation, names in architecture.activations.items() if name in names), None
    )
    if values["activation"] is None:
        known = [name for names in architecture.activations.values() for name in names]
        raise UserError(f"{where}: {architecture.activation_key}={name} is not supported, only {' or '.join(known)}")
    if values["positions"] is Positions.rope:
        try:
            values |= _read_rope(full, architecture, where)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: rotary positions that cannot be read: {error!r}") from error
    model = without_implied(ModelConfig(**values))
    try:
        _require_possible(model, architecture, where)
        check_ranges(model)
    except TypeError as error:
        raise UserError(f"{where}: holds something else than a number where one is needed: {error}") from error
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    return model


def without_nulls(content: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A config.json without nulls that only mean the default, and without the weights' type, which the files give.

    A null stays where it has its own meaning: where it is the default, or one of the values that can be converted.
    """
    defaults = CONFIG_MAPPING[architecture.model_type]().to_dict()
    only = _ONLY | dict(architecture.only)

    def means_default(key: str) -> bool:
        return None not in only.get(key, ()) and defaults.get(key, "none") is not None

    return {
        key: value
        for key, value in content.items()
        if key not in ("dtype", "torch_dtype") and not (value is None and means_default(key))
    }


def _with_defaults(content: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    # The configuration class fills in the defaults, which config.json leaves out.
    try:
        return CONFIG_MAPPING[architecture.model_type].from_dict(without_nulls(content, architecture)).to_dict()
    except (StrictDataclassError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _require_sizes(content: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Raise UserError, with config.json's own key, for a number that no model has, before anybody calculates with it."""
    for name, keys in architecture.fields.items():
        allowed = range_of(ModelConfig, name)
        for key in (keys,) if isinstance(keys, str) else keys:
            value = content.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue  # left out, or no number, which the configuration class says
            if refusal := allowed.refusal(value):
                raise UserError(f"{where}: {key}={value} {refusal}")


def _require_possible(model: ModelConfig, architecture: Architecture, where: str) -> None:
    """Raise UserError for sizes that no model can have, before tensors are compared with them."""

    def listed(*names: str) -> str:
        keys = [architecture.fields[name] for name in names]
        keys = [key if isinstance(key, str) else key[0] for key in keys]
        return ", ".join(f"{key}={getattr(model, name)}" for key, name in zip(keys, names, strict=True))

    heads, groups, _ = attention_shape(model)
    if model.head_dim is None and model.hidden_size % heads:
        raise UserError(f"{where}: {listed('hidden_size', 'num_attention_heads')}: the heads must divide the width")
    if groups < 1 or heads % groups:
        raise UserError(
            f"{where}: {listed('num_attention_heads', 'num_query_groups')}: the second must divide the first"
        )


def from_model_config(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """config.json of a model; the inverse of `to_model_config`."""
    content: dict[str, Any] = {"model_type": architecture.model_type}
    content |= {key: allowed[0] for key, allowed in architecture.only.items()}
    _, groups, width = attention_shape(model)
    filled = {
        "num_query_groups": groups,
        "head_dim": width,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
    }
    for name, keys in architecture.fields.items():
        for key in (keys,) if isinstance(keys, str) else keys:
            content[key] = filled.get(name, getattr(model, name))
    content[architecture.activation_key] = architecture.activations[model.activation][0]
    if model.positions is Positions.rope:
        content |= _write_rope(model, architecture)
    return content


def obstacles(model: ModelConfig, architecture: Architecture) -> list[str]:
    """What the architecture cannot express of a model, such as 'norm=rmsnorm'; empty when it can be written as one."""
    model = without_implied(model)
    found = [name for name, value in architecture.fixed.items() if getattr(model, name) != value]
    if model.activation not in architecture.activations:
        found.append("activation")
    expressible = {*architecture.fields, *architecture.fixed, *_FREE, "activation"}
    if model.positions is Positions.learned or architecture.fixed["positions"] is Positions.rope:
        expressible |= _ROPE_FIELDS
    if architecture.rope_keys[1] is None and model.positions is Positions.rope:
        expressible.discard("rope_fraction")
    others = [field for field in fields(ModelConfig) if field.name not in expressible and field.default is not MISSING]
    found += [field.name for field in others if getattr(model, field.name) != field.default]
    return [f"{name}={_plain(getattr(model, name))}" for name in found]


def _read_rope(full: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    # transformers 5 has all of it in rope_parameters; 4 has rope_theta beside rope_scaling.
    base_key, fraction_key = architecture.rope_keys
    rope: dict[str, Any] = {"rope_theta": full.get(base_key), "partial_rotary_factor": full.get(fraction_key or "")}
    rope |= full.get("rope_scaling") or {}
    rope |= full.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("rope_theta") is None:
        raise UserError(f"{where}: {base_key}=None: the base of the rotary positions is needed")
    values: dict[str, Any] = {"rope_base": float(rope["rope_theta"])}
    fraction = rope.get("partial_rotary_factor")
    if fraction_key is not None and fraction is not None:
        values["rope_fraction"] = fraction
    elif fraction not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor={fraction} is not supported, only 1")
    if kind == "linear":
        values |= {"rope_scaling": RopeScaling.linear, "rope_scaling_factor": float(rope["factor"])}
    elif kind == "llama3":
        values |= {
            "rope_scaling": RopeScaling.llama3,
            "rope_scaling_factor": float(rope["factor"]),
            "rope_original_length": rope["original_max_position_embeddings"],
            "rope_low_frequency": float(rope["low_freq_factor"]),
            "rope_high_frequency": float(rope["high_freq_factor"]),
        }
    elif kind != "default":
        raise UserError(f"{where}: rope_type={kind} is not supported, only default, linear or llama3")
    for name, key in {"rope_base": base_key, **_ROPE_KEYS}.items():
        if name in values and (refusal := range_of(ModelConfig, name).refusal(values[name])):
            raise UserError(f"{where}: {key}={values[name]} {refusal}")
    return values


def _write_rope(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    # As transformers 4 writes it; 5 reads both.
    base_key, fraction_key = architecture.rope_keys
    content: dict[str, Any] = {base_key: model.rope_base}
    if fraction_key is not None:
        content[fraction_key] = model.rope_fraction
    if model.rope_scaling is RopeScaling.linear:
        content["rope_scaling"] = {"rope_type": "linear", "factor": model.rope_scaling_factor}
    elif model.rope_scaling is RopeScaling.llama3:
        content["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "original_max_position_embeddings": model.rope_original_length,
            "low_freq_factor": model.rope_low_frequency,
            "high_freq_factor": model.rope_high_frequency,
        }
    return content


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
