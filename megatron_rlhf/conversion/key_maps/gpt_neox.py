"""GPT-NeoX and Pythia: a head's query, key and value are together, as in Megatron; part of each head is rotated."""

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import Architecture, layer_norms, same

LAYER = "gpt_neox.layers.{}."

ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    classes="GPTNeoX",
    prefix="gpt_neox.",
    tensors={
        megatron.WORD_EMBEDDINGS: same("gpt_neox.embed_in.weight"),
        **layer_norms(
            LAYER + "input_layernorm", LAYER + "post_attention_layernorm", "gpt_neox.final_layer_norm", bias=True
        ),
        f"{megatron.QKV}.weight": same(LAYER + "attention.query_key_value.weight"),
        f"{megatron.QKV}.bias": same(LAYER + "attention.query_key_value.bias"),
        f"{megatron.PROJECTION}.weight": same(LAYER + "attention.dense.weight"),
        f"{megatron.PROJECTION}.bias": same(LAYER + "attention.dense.bias"),
        f"{megatron.FC1}.weight": same(LAYER + "mlp.dense_h_to_4h.weight"),
        f"{megatron.FC1}.bias": same(LAYER + "mlp.dense_h_to_4h.bias"),
        f"{megatron.FC2}.weight": same(LAYER + "mlp.dense_4h_to_h.weight"),
        f"{megatron.FC2}.bias": same(LAYER + "mlp.dense_4h_to_h.bias"),
        megatron.HEAD: same("embed_out.weight"),
    },
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "norm_epsilon": "layer_norm_eps",
        "parallel_residual": "use_parallel_residual",
        "tied_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    fixed={"positions": Positions.rope, "norm": Norm.layernorm, "linear_bias": True},
    activations={
        Activation.gelu_exact: ("gelu",),
        Activation.gelu: ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        Activation.relu: ("relu",),
    },
    only={"attention_bias": (True,)},
    rope_keys=("rotary_emb_base", "rotary_pct"),
    token_head="classifier",
    unused=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
    ),
)
