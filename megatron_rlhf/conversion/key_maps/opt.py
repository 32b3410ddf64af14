"""OPT: GPT-3's shape with ReLU; the position embedding has two rows before that of the first token."""

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import Architecture, grouped, layer_norms, same

LAYER = "model.decoder.layers.{}."
ATTENTION = LAYER + "self_attn."

ARCHITECTURE = Architecture(
    model_type="opt",
    classes="OPT",
    prefix="model.",
    tensors={
        megatron.WORD_EMBEDDINGS: same("model.decoder.embed_tokens.weight"),
        megatron.POSITION_EMBEDDINGS: same("model.decoder.embed_positions.weight"),
        **layer_norms(
            LAYER + "self_attn_layer_norm", LAYER + "final_layer_norm", "model.decoder.final_layer_norm", bias=True
        ),
        f"{megatron.QKV}.weight": grouped(*[f"{ATTENTION}{x}_proj.weight" for x in "qkv"]),
        f"{megatron.QKV}.bias": grouped(*[f"{ATTENTION}{x}_proj.bias" for x in "qkv"]),
        f"{megatron.PROJECTION}.weight": same(ATTENTION + "out_proj.weight"),
        f"{megatron.PROJECTION}.bias": same(ATTENTION + "out_proj.bias"),
        f"{megatron.FC1}.weight": same(LAYER + "fc1.weight"),
        f"{megatron.FC1}.bias": same(LAYER + "fc1.bias"),
        f"{megatron.FC2}.weight": same(LAYER + "fc2.weight"),
        f"{megatron.FC2}.bias": same(LAYER + "fc2.bias"),
        megatron.HEAD: same("lm_head.weight"),
    },
    fields={
        "num_layers": "num_hidden_layers",
        # The embedding of OPT-350M is narrower than the model: the keys do not agree, and it is refused.
        "hidden_size": ("hidden_size", "word_embed_proj_dim"),
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "ffn_hidden_size": "ffn_dim",
        "tied_embeddings": "tie_word_embeddings",
        "init_std": "init_std",
    },
    fixed={
        "positions": Positions.learned,
        "position_offset": 2,
        "norm": Norm.layernorm,
        "norm_epsilon": 1e-5,
        "linear_bias": True,
    },
    activations={
        Activation.relu: ("relu",),
        Activation.gelu_exact: ("gelu",),
        Activation.gelu: ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    },
    activation_key="activation_function",
    only={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    token_head=None,
)
