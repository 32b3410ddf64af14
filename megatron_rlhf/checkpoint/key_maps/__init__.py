"""Hugging Face architectures: one file each, named after the `model_type`; adding a file adds the architecture."""

import importlib
import pkgutil

from megatron_rlhf.checkpoint.architecture import Architecture

_PACKAGE = __name__

REFUSED = {
    "gemma": "gated GELU and norms that add one to their weight",
    "gemma2": "soft-capped logits and sliding windows",
    "gemma3": "sliding windows",
    "gemma3_text": "sliding windows",
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
}
"""Model types that cannot be carried, and what of them Megatron-Core's dense GPT layer lacks."""


def names() -> list[str]:
    """Every model type that can be converted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(model_type: str) -> Architecture:
    """The architecture of a `model_type` that is among `names()`."""
    return importlib.import_module(f"{_PACKAGE}.{model_type}").ARCHITECTURE
