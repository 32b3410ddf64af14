"""Hugging Face architectures: one file each, named after the `model_type`; adding a file adds the architecture."""

import importlib
import pkgutil

from megatron_rlhf.checkpoint.architecture import Architecture

_PACKAGE = __name__

REFUSED = {
    "gemma": "gated GELU, scaled embeddings",
    "gemma2": "norms after attention and MLP, soft-capped logits, sliding windows",
    "gemma3": "norms after attention and MLP, sliding windows with rotary periods of their own",
    "gemma3_text": "norms after attention and MLP, sliding windows with rotary periods of their own",
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
}
"""Model types that cannot be carried, and what of them our modules lack."""


def names() -> list[str]:
    """Every model type that can be converted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(model_type: str) -> Architecture:
    """The architecture of a `model_type` that is among `names()`."""
    return importlib.import_module(f"{_PACKAGE}.{model_type}").ARCHITECTURE
