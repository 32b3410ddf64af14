"""model_config.yaml of a `.nemo` archive -> the shape of a model."""

from collections.abc import Mapping
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, Positions, without_implied

# Settings that change the function and that our modules lack -> the values that leave it unchanged.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "transformer_block_type": ("pre_ln",),
    "normalize_attention_scores": (True,),
    "scale_positional_embedding": (False,),
    "num_moe_experts": (None, 1),
    "virtual_pipeline_model_parallel_size": (None, 1),
    "seq_len_interpolation_factor": (None, 1),
    "headscale": (False,),
    "window_size": (None,),
}


def read_shape(config: Mapping[str, Any], vocab_size: int, where: str) -> ModelConfig:
    """The shape that an archive's model_config.yaml describes; UserError for what our modules do not support."""
    for key, allowed in _ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}={config[key]} is not supported, only {' or '.join(map(str, allowed))}")
    missing = [key for key in ("num_layers", "hidden_size", "num_attention_heads") if key not in config]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; it is not the configuration of a GPT")
    bias = config.get("bias", True)
    model = ModelConfig(
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_query_groups"),
        head_dim=config.get("kv_channels"),
        ffn_hidden_size=config.get("ffn_hidden_size"),
        vocab_size=vocab_size,
        max_sequence_length=config.get("max_position_embeddings") or config["encoder_seq_length"],
        positions=_one_of(
            config,
            "position_embedding_type",
            "learned_absolute",
            {"learned_absolute": Positions.learned, "rope": Positions.rope},
            where,
        ),
        rope_base=float(config.get("rotary_base", 10000.0)),
        rope_fraction=config.get("rotary_percentage", 1.0),
        norm=_one_of(
            config, "normalization", "layernorm", {"layernorm": Norm.layernorm, "rmsnorm": Norm.rmsnorm}, where
        ),
        norm_epsilon=config.get("layernorm_epsilon", 1e-5),
        activation=_activation(config, where),
        linear_bias=bias,
        qkv_bias=bool(config.get("qkv_bias", False)) and not bias,
        qk_norm=bool(config.get("qk_layernorm", False)),
        tied_embeddings=config.get("share_embeddings_and_output_weights", True),
    )
    return without_implied(model)


def _one_of(config: Mapping[str, Any], key: str, default: str, known: Mapping[str, Any], where: str) -> Any:
    value = config.get(key, default)
    if value not in known:
        raise UserError(f"{where}: {key}={value} is not supported, only {' or '.join(known)}")
    return known[value]


def _activation(config: Mapping[str, Any], where: str) -> Activation:
    # Megatron's fused GELU is the tanh approximation, and fusing is the default.
    fused = config.get("bias_activation_fusion", config.get("bias_gelu_fusion", True)) and config.get("bias", True)
    gelu = Activation.gelu if fused or config.get("openai_gelu", False) else Activation.gelu_exact
    known = {"gelu": gelu, "relu": Activation.relu, "swiglu": Activation.swiglu, "fast-swiglu": Activation.swiglu}
    return _one_of(config, "activation", "gelu", known, where)
