"""Megatron-Core's fused kernels: which of them compute what a model computes, and are there."""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from torch.nn import functional as F

from megatron_rlhf.config.model import Activation, FusedKernels, ModelConfig, Positions
from megatron_rlhf.parallel.accelerators import transformer_engine_serves


def fusions(model: ModelConfig, choice: FusedKernels) -> dict[str, Any]:
    """Settings of Megatron-Core's configuration. Without a GPU `on` runs the same functions step by step, for tests.

    The loss over the vocabulary is not among them: `parallel.vocab` has one of its own, which keeps nothing of the logits'
    size but their gradient.
    """
    on = choice is FusedKernels.on or (choice is FusedKernels.auto and torch.cuda.is_available())
    # Megatron-Core calls its fused tanh approximation by the name of the exact function, and has it only with a bias.
    tanh = model.activation is Activation.gelu and model.linear_bias
    activation: dict[str, Any] = {"activation_func": F.gelu} if on and tanh else {}
    return {
        "bias_activation_fusion": on and (tanh or model.activation is Activation.swiglu),
        "bias_dropout_fusion": on,
        "apply_rope_fusion": on and model.positions is Positions.rope and _rope_is_fused(),
        "gradient_accumulation_fusion": on and layers._grad_accum_fusion_available,
        **activation,
    }


def _rope_is_fused() -> bool:
    return transformer_engine_serves() and rope_utils.fused_apply_rotary_pos_emb is not None
