"""Qwen2 and Qwen2.5: Llama's tensors, plus biases on queries, keys and values."""

import dataclasses

from megatron_rlhf.conversion.key_maps import llama

ARCHITECTURE = dataclasses.replace(
    llama.ARCHITECTURE,
    model_type="qwen2",
    classes="Qwen2",
    fields={name: key for name, key in llama.ARCHITECTURE.fields.items() if name not in ("linear_bias", "head_dim")},
    fixed={**llama.ARCHITECTURE.fixed, "linear_bias": False, "qkv_bias": True},
    only={"use_sliding_window": (False,)},
)
