"""GPT-2: learned positions, one Conv1D ([in, out]) for queries, keys and values."""

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import Architecture, grouped, layer_norms, same

LAYER = "transformer.h.{}."

ARCHITECTURE = Architecture(
    model_type="gpt2",
    classes="GPT2",
    prefix="transformer.",
    tensors={
        megatron.WORD_EMBEDDINGS: same("transformer.wte.weight"),
        megatron.POSITION_EMBEDDINGS: same("transformer.wpe.weight"),
        **layer_norms(LAYER + "ln_1", LAYER + "ln_2", "transformer.ln_f", bias=True),
        f"{megatron.QKV}.weight": grouped(LAYER + "attn.c_attn.weight", transposed=True),
        f"{megatron.QKV}.bias": grouped(LAYER + "attn.c_attn.bias"),
        f"{megatron.PROJECTION}.weight": same(LAYER + "attn.c_proj.weight", transposed=True),
        f"{megatron.PROJECTION}.bias": same(LAYER + "attn.c_proj.bias"),
        f"{megatron.FC1}.weight": same(LAYER + "mlp.c_fc.weight", transposed=True),
        f"{megatron.FC1}.bias": same(LAYER + "mlp.c_fc.bias"),
        f"{megatron.FC2}.weight": same(LAYER + "mlp.c_proj.weight", transposed=True),
        f"{megatron.FC2}.bias": same(LAYER + "mlp.c_proj.bias"),
        megatron.HEAD: same("lm_head.weight"),
    },
    fields={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_sequence_length": "n_positions",
        "ffn_hidden_size": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    fixed={"positions": Positions.learned, "norm": Norm.layernorm, "linear_bias": True},
    activations={
        Activation.gelu: ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        Activation.gelu_exact: ("gelu",),
        Activation.relu: ("relu",),
    },
    activation_key="activation_function",
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the same function, summed more precisely in half precision
        "add_cross_attention": (False,),
    },
    language_class="LMHeadModel",
    token_head="classifier",
    unused=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
