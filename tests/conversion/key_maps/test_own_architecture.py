"""An architecture that is not there, added as CONTRIBUTING.md says: one file, from the nearest one and `transformers`' class."""

import torch
from safetensors.torch import load_file
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from megatron_rlhf.conversion import convert, key_maps
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles

CHECK = CheckOptions([5, 6, 7, 8] * 4)

STARCODER2 = '''
"""StarCoder2: rotary positions, LayerNorm, grouped queries, an ungated MLP, biases everywhere."""

from megatron_rlhf.config.model import Activation, Norm, Positions
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import Architecture, grouped, layer_norms, same

LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."

ARCHITECTURE = Architecture(
    model_type="starcoder2",
    classes="Starcoder2",
    prefix="model.",
    tensors={
        megatron.WORD_EMBEDDINGS: same("model.embed_tokens.weight"),
        **layer_norms(LAYER + "input_layernorm", LAYER + "post_attention_layernorm", "model.norm", bias=True),
        f"{megatron.QKV}.weight": grouped(*[f"{ATTENTION}{x}_proj.weight" for x in "qkv"]),
        f"{megatron.QKV}.bias": grouped(*[f"{ATTENTION}{x}_proj.bias" for x in "qkv"]),
        f"{megatron.PROJECTION}.weight": same(ATTENTION + "o_proj.weight"),
        f"{megatron.PROJECTION}.bias": same(ATTENTION + "o_proj.bias"),
        f"{megatron.FC1}.weight": same(LAYER + "mlp.c_fc.weight"),
        f"{megatron.FC1}.bias": same(LAYER + "mlp.c_fc.bias"),
        f"{megatron.FC2}.weight": same(LAYER + "mlp.c_proj.weight"),
        f"{megatron.FC2}.bias": same(LAYER + "mlp.c_proj.bias"),
        megatron.HEAD: same("lm_head.weight"),
    },
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "norm_epsilon": "norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    fixed={"positions": Positions.rope, "norm": Norm.layernorm, "linear_bias": True},
    activations={Activation.gelu: ("gelu_pytorch_tanh", "gelu_new")},
    only={"use_bias": (True,), "sliding_window": (None,)},
)
'''


def test_one_file_is_enough(world, tmp_path, monkeypatch):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "starcoder2.py").write_text(STARCODER2)
    monkeypatch.setattr(key_maps, "__path__", [*key_maps.__path__, str(tmp_path / "maps")])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape = {**sizes, "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64}
    config = Starcoder2Config(**shape, sliding_window=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = Starcoder2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "theirs")
    assert "starcoder2" in key_maps.names()
    # Each direction compares every tensor, and both models' outputs.
    convert.import_huggingface(tmp_path / "theirs", tmp_path / "ours", None, CHECK)
    extra = ExtraFiles.find(tmp_path / "ours", None)
    convert.export_huggingface(tmp_path / "ours", tmp_path / "again", "policy", None, None, extra, CHECK)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
