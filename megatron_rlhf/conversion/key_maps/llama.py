"""Llama 1 to 3: rotary positions (stretched from 3.1 on), RMSNorm, SwiGLU, grouped queries."""

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import Architecture, grouped, layer_norms, same, stacked

LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."

ARCHITECTURE = Architecture(
    model_type="llama",
    classes="Llama",
    prefix="model.",
    tensors={
        megatron.WORD_EMBEDDINGS: same("model.embed_tokens.weight"),
        **layer_norms(LAYER + "input_layernorm", LAYER + "post_attention_layernorm", "model.norm", bias=False),
        f"{megatron.QKV}.weight": grouped(*[f"{ATTENTION}{x}_proj.weight" for x in "qkv"]),
        f"{megatron.QKV}.bias": grouped(*[f"{ATTENTION}{x}_proj.bias" for x in "qkv"]),
        f"{megatron.PROJECTION}.weight": same(ATTENTION + "o_proj.weight"),
        f"{megatron.PROJECTION}.bias": same(ATTENTION + "o_proj.bias"),
        f"{megatron.FC1}.weight": stacked(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        f"{megatron.FC1}.bias": stacked(LAYER + "mlp.gate_proj.bias", LAYER + "mlp.up_proj.bias"),
        f"{megatron.FC2}.weight": same(LAYER + "mlp.down_proj.weight"),
        f"{megatron.FC2}.bias": same(LAYER + "mlp.down_proj.bias"),
        megatron.HEAD: same("lm_head.weight"),
    },
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "norm_epsilon": "rms_norm_eps",
        "linear_bias": ("attention_bias", "mlp_bias"),
        "tied_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    fixed={"positions": Positions.rope, "norm": Norm.rmsnorm},
    activations={Activation.swiglu: ("silu", "swish")},
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
