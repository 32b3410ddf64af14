"""Hugging Face architectures, one file each, named after the `model_type`; adding a file adds the architecture."""

import importlib
import pkgutil

from megatron_rlhf.conversion.architecture import Architecture

_PACKAGE = __name__

_GEMMA = "norms on what attention and MLP give, scaled embeddings, norm weights counted from 1"
REFUSED = {
    "gemma": "gated GELU, scaled embeddings, norm weights counted from 1",
    "gemma2": f"{_GEMMA}, soft-capped attention scores and logits, sliding windows",
    "gemma3": f"{_GEMMA}, a rotary base of their own in layers with sliding windows",
    "gemma3_text": f"{_GEMMA}, a rotary base of their own in layers with sliding windows",
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
}
"""Model types that cannot be converted, and which of their features our modules lack.

Of Gemma 2 and 3, Megatron-Core 0.16.1 has the scale of attention scores (`softmax_scale`) and windows in some layers
(`window_attn_skip_freq`). It lacks: a place in `TransformerLayerSubmodules` for the norms after attention and MLP (both),
soft-capping in `DotProductAttention` and `GPTModel` (2), a second rotary table in `GPTModel` (3), a factor on the output of
`LanguageModelEmbedding` (both), and `layernorm_zero_centered_gamma` outside of Transformer Engine (both).
"""


def names() -> list[str]:
    """Every model type that can be converted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(model_type: str) -> Architecture:
    """The architecture of a `model_type` from `names()`."""
    return importlib.import_module(f"{_PACKAGE}.{model_type}").ARCHITECTURE
