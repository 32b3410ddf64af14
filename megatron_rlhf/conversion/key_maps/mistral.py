"""Mistral: Llama's tensors; models that attend through a sliding window are refused."""

import dataclasses

from megatron_rlhf.conversion.key_maps import llama

ARCHITECTURE = dataclasses.replace(
    llama.ARCHITECTURE,
    model_type="mistral",
    classes="Mistral",
    fields={name: key for name, key in llama.ARCHITECTURE.fields.items() if name != "linear_bias"},
    fixed={**llama.ARCHITECTURE.fixed, "linear_bias": False},
    only={"sliding_window": (None,)},
)
