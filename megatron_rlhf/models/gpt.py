"""GPTModel from a ModelConfig."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import Activation, Fp8Recipe, ModelConfig, Norm, Positions, Precision, RopeScaling
from megatron_rlhf.models import adapters, trainable
from megatron_rlhf.models.layers.activations import gelu_tanh
from megatron_rlhf.models.layers.fusions import fusions
from megatron_rlhf.models.layers.spec import block_spec
from megatron_rlhf.models.packed import LanguageModel, ScalarModel
from megatron_rlhf.parallel.layout import ParallelLayout

# e4m3 for activations and weights, e5m2 for their gradients.
FP8_FORMAT = "hybrid"
FP4_FORMAT = "e2m1"

_ACTIVATIONS = {
    Activation.gelu: gelu_tanh,
    Activation.gelu_exact: F.gelu,
    Activation.relu: F.relu,
    Activation.swiglu: F.silu,
}
_DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp8_hybrid: torch.bfloat16,
}


def transformer_config(
    model: ModelConfig,
    layout: ParallelLayout,
    precision: Precision,
    dropout: float = 0.0,
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise,
) -> TransformerConfig:
    """Megatron-Core's configuration of one model in one layout."""
    parallel = layout.config
    recompute: dict[str, Any] = (
        {} if parallel.recompute.value == "none" else {"recompute_granularity": parallel.recompute.value}
    )
    if parallel.recompute.value == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    dtype = _DTYPES[precision]
    settings: dict[str, Any] = {
        "activation_func": _ACTIVATIONS[model.activation],
        **fusions(model, parallel.fused_kernels),
        **(_fp8_settings(fp8_recipe) if precision is Precision.fp8_hybrid else {}),
        **recompute,
    }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_dim or model.hidden_size // model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        normalization="RMSNorm" if model.norm is Norm.rmsnorm else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation is Activation.swiglu,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        init_method_std=model.init_std,
        hidden_dropout=dropout,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        virtual_pipeline_model_parallel_size=layout.virtual_stages,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        # Microbatches of several lengths in one schedule; Megatron-Core requires this dispatcher for that, even without
        # experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # With virtual stages on two ranks, both neighbours of a rank are the same: batched messages would be mixed up.
        overlap_p2p_comm=layout.virtual_stages is not None,
        batch_p2p_comm=layout.virtual_stages is None,
        calculate_per_token_loss=True,  # data parallelism sums gradients: losses are normalised by global counts
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # The interleaved schedule frees what it is still sending. CUDA's streams order that; gloo would read freed memory.
        deallocate_pipeline_outputs=layout.virtual_stages is None or torch.cuda.is_available(),
        **settings,
    )


def _fp8_settings(recipe: Fp8Recipe) -> dict[str, Any]:
    """Only the layers' matrix products: attention's scores, embeddings and heads do not use fp8."""
    if recipe is Fp8Recipe.nvfp4:  # a mode of its own in Megatron-Core, which then ignores fp8's recipe
        return {"fp4": FP4_FORMAT, "fp4_recipe": recipe.value, "fp8_recipe": recipe.value}
    return {
        "fp8": FP8_FORMAT,
        "fp8_recipe": recipe.value,
        # Delayed scaling: PPO and pretraining microbatches alternate and their gradients differ in size; a long memory of
        # the largest covers both.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        # Data-parallel ranks may have different numbers of microbatches, so they cannot agree on a scale after each one.
        "tp_only_amax_red": True,
    }


def build_chunks(
    model: ModelConfig,
    layout: ParallelLayout,
    precision: Precision,
    scalar: bool = False,
    dropout: float = 0.0,
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise,
    adapter: Adapter | None = None,
    adapter_dropout: float = 0.0,
) -> list[GPTModel]:
    """This rank's part of a model: one chunk, or one for each virtual stage. Weights are random.

    With adapters, these and a scalar head are all that trains.
    """
    config = transformer_config(model, layout, precision, dropout, fp8_recipe)
    virtual = layout.config.virtual_stages
    chunks = []
    with layout:
        for stage in range(virtual):
            vp_stage = stage if virtual > 1 else None
            arguments: dict = {
                "config": config,
                "transformer_layer_spec": block_spec(model, config, layout, vp_stage, fuses_norms=adapter is None),
                "vocab_size": model.padded_vocab_size(layout.config.tensor),
                "max_sequence_length": model.max_sequence_length + model.position_offset,
                "pre_process": layout.is_first_stage and stage == 0,
                "post_process": layout.is_last_stage and stage == virtual - 1,
                "parallel_output": True,
                "position_embedding_type": "rope" if model.positions is Positions.rope else "learned_absolute",
                "rotary_base": model.rope_base,
                "rotary_percent": model.rope_fraction,
                "pg_collection": layout.groups,
                "vp_stage": vp_stage,
            }
            chunk: GPTModel
            if scalar:
                chunk = ScalarModel(share_embeddings_and_output_weights=False, **arguments)
            else:
                chunk = LanguageModel(
                    share_embeddings_and_output_weights=model.tied_embeddings,
                    real_vocab_size=model.vocab_size,
                    **arguments,
                )
            _adapt_positions(chunk, model)
            if adapter is not None:
                adapters.attach(chunk, model, adapter, adapter_dropout)
                if scalar and chunk.post_process:
                    chunk.output_layer.requires_grad_(True)
                trainable.carry_gradients(chunk)
            chunks.append(_to_device(chunk, config))
    return chunks


def _adapt_positions(chunk: GPTModel, model: ModelConfig) -> None:
    """What Megatron-Core's positions lack: rows before the first position, and all parameters of Llama 3.1's scaling."""
    if model.position_offset and chunk.pre_process:
        chunk.embedding.position_embeddings.register_forward_pre_hook(
            lambda module, arguments: (arguments[0] + model.position_offset,)
        )
    if model.rope_scaling is RopeScaling.linear:
        chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq / model.rope_scaling_factor
    elif model.rope_scaling is RopeScaling.llama3:
        chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb._apply_scaling(
            chunk.rotary_pos_emb.inv_freq,
            model.rope_scaling_factor,
            model.rope_low_frequency,
            model.rope_high_frequency,
            model.rope_original_length,
        )


def _to_device(chunk: GPTModel, config: TransformerConfig) -> GPTModel:
    chunk = chunk.to(torch.cuda.current_device()) if torch.cuda.is_available() else chunk
    return chunk.to(config.params_dtype) if config.params_dtype is not torch.float32 else chunk
