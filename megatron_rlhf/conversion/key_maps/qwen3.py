"""Qwen3 (dense): Llama's tensors, plus a norm on every head's query and key."""

import dataclasses

from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import same
from megatron_rlhf.conversion.key_maps import llama

ARCHITECTURE = dataclasses.replace(
    llama.ARCHITECTURE,
    model_type="qwen3",
    classes="Qwen3",
    tensors={
        **llama.ARCHITECTURE.tensors,
        f"{megatron.QUERY_NORM}.weight": same(llama.ATTENTION + "q_norm.weight"),
        f"{megatron.KEY_NORM}.weight": same(llama.ATTENTION + "k_norm.weight"),
    },
    fields={name: key for name, key in llama.ARCHITECTURE.fields.items() if name != "linear_bias"},
    fixed={**llama.ARCHITECTURE.fixed, "linear_bias": False, "qk_norm": True},
    only={"use_sliding_window": (False,), "attention_bias": (False,)},
)
