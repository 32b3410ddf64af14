"""The layers of a GPT: Transformer Engine's where it is installed and there is a GPU, plain torch ones elsewhere."""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.models.layers.attention import CachedSelfAttention, ScaledDotProductAttention
from megatron_rlhf.models.layers.decoding import DecodingLayer, ParallelResidualLayer
from megatron_rlhf.models.layers.linear import ColumnLinear, RowLinear
from megatron_rlhf.parallel import compat
from megatron_rlhf.parallel.accelerators import transformer_engine_serves
from megatron_rlhf.parallel.layout import ParallelLayout


def block_spec(
    model: ModelConfig,
    config: TransformerConfig,
    layout: ParallelLayout,
    vp_stage: int | None,
    fuses_norms: bool = True,
) -> TransformerBlockSubmodules:
    """The layers of one chunk, and the norm after the model's last layer.

    `fuses_norms`: Transformer Engine may normalise inside the linear layers, whose input is then not normalised.
    """
    layer = ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else DecodingLayer,
        submodules=_layer_submodules(model, fuses_norms),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=_final_norm())


def _layer_submodules(model: ModelConfig, fuses_norms: bool) -> TransformerLayerSubmodules:
    """The parts of a layer. Names in checkpoints are the same for both kinds: those of Transformer Engine, which fuses norms."""
    column: type
    row: type
    norm: type
    qk_norm: type
    if transformer_engine_serves():
        from megatron.core.extensions import transformer_engine as fused

        row, qk_norm = fused.TERowParallelLinear, fused.TENorm
        column, norm = fused.TEColumnParallelLinear, fused.TENorm
        if fuses_norms:
            column, norm = fused.TELayerNormColumnParallelLinear, IdentityOp
    else:
        column, row = ColumnLinear, RowLinear
        norm = qk_norm = SequenceParallelNorm
    if not model.qk_norm:
        qk_norm = IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=ScaledDotProductAttention,  # the same everywhere, with a cache that training does not use
        linear_proj=row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(CachedSelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=compat.dense_mlp(MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def _final_norm() -> type:
    if transformer_engine_serves():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return SequenceParallelNorm


class SequenceParallelNorm:
    """torch's LayerNorm or RMSNorm whose gradients Megatron-Core sums over tensor-parallel ranks under sequence parallelism.

    Megatron-Core's own wrapper refuses sequence parallelism, though all that is needed is a flag on the parameters.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
