"""adapter_config.json of `peft`, checked: what has a meaning here, with values that can be used."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.hf.folder import read_json

SETTINGS = "adapter_config.json"

# Settings that change the function, or the base's weights, in ways that adapters here do not have.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters"), (None, [])),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "arrow_config"), (None, [])),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _each(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object of such values, or nothing."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(is_one, value.values())))


# Setting -> whether it must be there, what holds its value, and what that is in words.
_VALUES: Mapping[str, tuple[bool, Callable[[Any], bool], str]] = {
    "r": (True, _is_rank, "a whole number of at least 1"),
    "lora_alpha": (True, _is_scale, "a number of more than 0"),
    "rank_pattern": (False, _each(_is_rank), "an object of whole numbers of at least 1"),
    "alpha_pattern": (False, _each(_is_scale), "an object of numbers of more than 0"),
    "use_rslora": (False, lambda value: value is None or isinstance(value, bool), "true or false"),
    "base_model_name_or_path": (False, lambda value: value is None or isinstance(value, str), "a text"),
}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder.

    Raises:
        UserError: naming the setting that is missing, is no such value, or changes what adapters here cannot.
    """
    where = folder / SETTINGS
    settings = read_json(where)
    for name, allowed in _ONLY.items():
        if name in settings and settings[name] not in allowed:
            raise UserError(
                f"{where}: {name}={settings[name]} is not supported, only {allowed[0]}; merge the adapter in peft"
            )
    for name, (needed, holds, words) in _VALUES.items():
        if name not in settings and needed:
            raise UserError(f"{where}: {name} is missing: {words}")
        if name in settings and not holds(settings[name]):
            raise UserError(f"{where}: {name}={settings[name]!r:.80} must be {words}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in settings.get(name) or {}:
            try:
                re.compile(pattern_of_modules(key))
            except re.error as error:
                raise UserError(f"{where}: {name}: {key!r} must be a regular expression: {error}") from error
    return settings


def pattern_of_modules(key: str) -> str:
    """The modules that a key of rank_pattern or alpha_pattern means, by `peft`'s rule: the first key that matches counts."""
    return rf"(.*\.)?({key})$"
