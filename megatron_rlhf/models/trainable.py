"""Training some of a model's weights: those of some layers, or whose names match a pattern.

Frozen weights have no gradient buffers and no optimizer state. Names are those of checkpoints, with the layer's number, so
a selection means the same on every layout and machine: `decoder.layers.3.self_attention.linear_qkv.layer_norm_weight`.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlhf.config.lora import selects

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Without Transformer Engine, which fuses them with the matrices that follow, norms are modules of their own.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def named_weights(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """A chunk's parameters by their names in checkpoints."""
    for name, parameter in chunk.named_parameters():
        if found := _IN_LAYER.fullmatch(name):
            rest = found[2]
            for module, fused in _NORMS.items():
                rest = rest.replace(module, fused)
            name = f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}.{rest}"
        elif name == "output_layer.weight" and getattr(parameter, "shared_embedding", False):
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
        yield name, parameter


def train_only(chunk: GPTModel, patterns: Sequence[str]) -> None:
    """Freeze all weights but those selected."""
    for name, parameter in named_weights(chunk):
        parameter.requires_grad_(any(selects(pattern, name) for pattern in patterns))


def carry_gradients(chunk: GPTModel) -> None:
    """Recomputed layers get gradients only if their input asks for some, which a frozen embedding's does not."""
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        chunk.embedding.register_forward_hook(_ask_for_gradients)


def _ask_for_gradients(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
