"""config.json <-> ModelConfig: what is understood, what is refused, and with which message."""

import json

import hf_models
import pytest
import torch
from safetensors.torch import save_file

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, Positions, RopeScaling
from megatron_rlhf.conversion import key_maps
from megatron_rlhf.conversion.architecture import tensor_shapes
from megatron_rlhf.conversion.hf import config as hf_config
from megatron_rlhf.conversion.hf import load as hf_load
from megatron_rlhf.conversion.hf.folder import TensorFiles
from megatron_rlhf.conversion.hf.weights import Described
from megatron_rlhf.conversion.whole_tensors import places


def write(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def llama(**changes):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **changes,
    }


def test_llama_as_transformers_4_writes_it(tmp_path):
    content = llama(
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected = ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=99,
        max_sequence_length=128,
        positions=Positions.rope,
        rope_base=500000.0,
        rope_scaling=RopeScaling.llama3,
        rope_scaling_factor=8.0,
        norm=Norm.rmsnorm,
        norm_epsilon=1e-6,
        activation=Activation.swiglu,
        linear_bias=False,
        tied_embeddings=False,
    )
    assert hf_load.read_model_config(write(tmp_path / "four", content)) == (expected, False)


def test_llama_as_transformers_5_writes_it(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}
    model, _ = hf_load.read_model_config(write(tmp_path, llama(rope_parameters=rope)))
    assert (model.rope_base, model.rope_scaling, model.rope_scaling_factor) == (20000.0, RopeScaling.linear, 2.0)


def test_defaults_that_config_json_leaves_out_are_the_architecture_s(tmp_path):
    model, _ = hf_load.read_model_config(write(tmp_path, {"model_type": "gpt2"}))
    assert (model.num_layers, model.hidden_size, model.vocab_size, model.tied_embeddings) == (12, 768, 50257, True)
    assert (model.ffn_hidden_size, model.num_query_groups, model.head_dim) == (None, None, None)


def test_every_architecture_has_a_case():
    assert {model_type for model_type, _ in hf_models.CASES.values()} == set(key_maps.names())


@pytest.mark.parametrize("case", hf_models.CASES)
def test_a_shape_survives_being_written_and_read(case):
    model_type, settings = hf_models.CASES[case]
    architecture = key_maps.load(model_type)
    model = hf_config.to_model_config({"model_type": model_type, **settings}, architecture, "test")
    assert hf_config.obstacles(model, architecture) == []
    assert hf_config.to_model_config(hf_config.from_model_config(model, architecture), architecture, "test") == model


@pytest.mark.parametrize("case", hf_models.CASES)
@pytest.mark.parametrize("scalar", [False, True])
def test_every_row_of_every_tensor_is_used_once(case, scalar):
    model_type, settings = hf_models.CASES[case]
    architecture = key_maps.load(model_type)
    model = hf_config.to_model_config({"model_type": model_type, **settings}, architecture, "test")
    content = {"architectures": [architecture.classes + ("ForSequenceClassification" if scalar else "Model")]}
    described = Described(
        architecture, model, hf_config.read_head({**content, "id2label": {"0": "score"}}, architecture, "test")
    )
    used: dict[str, list[range]] = {}
    for place in places(tensor_shapes(model, scalar), model.num_layers):
        ours = 0
        for run in described.runs(place):
            used.setdefault(run.name, []).append(range(run.start, run.start + run.count))
            ours += run.count
        assert ours == described.shapes[place.key][0], place
    for name, ranges in used.items():
        rows = sorted(row for part in ranges for row in part)
        assert rows == list(range(len(rows))), name


def test_a_scalar_head_is_seen(tmp_path):
    content = llama(architectures=["LlamaForSequenceClassification"], id2label={"0": "score"})
    assert hf_load.read_model_config(write(tmp_path, content))[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type=bert cannot be converted; these can: gpt2, gpt_neox, llama"),
        ({"model_type": "mixtral"}, "model_type=mixtral cannot be converted (mixture of experts"),
        ({"model_type": "gemma2"}, "gemma2 cannot be converted (norms on what attention and MLP give, scaled"),
        ({"model_type": "gemma3_text"}, "a rotary base of their own in layers with sliding windows: not supported"),
        ({"num_hidden_layers": "four"}, "Field 'num_hidden_layers' expected int, got str (value: 'four')"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1 and at most 10000"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8, num_key_value_heads=3: the second must divide the first"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config={'quant_method': 'gptq'} is not supported",
        ),
        ({"is_causal": False}, "is_causal=False is not supported"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"] * 2},
            "layer_types=sliding_attention is not supported, only full_attention",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rotary positions that cannot be read"),
        ({"rope_theta": "x"}, "rotary positions that cannot be read"),
        ({"rope_theta": 0}, "config.json: rope_theta=0.0 must be more than 0"),
        ({"rope_theta": float("inf")}, "config.json: rope_theta=inf must be a"),
        ({"model_type": "gpt_neox", "rotary_emb_base": -1}, "config.json: rotary_emb_base=-1.0 must be more than 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "config.json: factor=0.0 must be"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads=0 must be at least 1"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads=0 must be at least 1"),
        ({"model_type": "gpt2", "n_head": 0}, "config.json: n_head=0 must be at least 1"),
        (
            {"num_hidden_layers": 1_000_000},
            "config.json: num_hidden_layers=1000000 must be at least 1 and at most 10000",
        ),
        ({"hidden_size": 10**9}, "config.json: hidden_size=1000000000 must be at least 1 and at most 1048576"),
        ({"vocab_size": 10**9}, "config.json: vocab_size=1000000000 must be at least 1 and at most 16777216"),
        ({"intermediate_size": 10**10}, "config.json: intermediate_size=10000000000 must be"),
        ({"model_type": "qwen3", "num_hidden_layers": 10**7}, "num_hidden_layers=10000000 must be"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be more than 0"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings=1099511627776 must be at most 2147483647"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096 is not supported, only None"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ({"model_type": "opt", "word_embed_proj_dim": 32}, "hidden_size=64, word_embed_proj_dim=32"),
        ({"attention_bias": True}, "attention_bias=True, mlp_bias=False: not supported unless they agree"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported, only silu or swish"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ": rope_type=yarn is not supported, only default, linear or llama3",
        ),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification has 2 labels; a reward or value model has num_labels=1",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(tmp_path, changes, message):
    content = llama(**changes)
    if "model_type" in changes:
        content["architectures"] = None
    with pytest.raises(UserError) as caught:
        hf_load.read_model_config(write(tmp_path, content))
    assert message in str(caught.value)
    assert str(caught.value).count("config.json") == 1


def test_heads_that_do_not_divide_the_width(tmp_path):
    with pytest.raises(UserError, match="n_embd=64, n_head=7: the heads must divide the width"):
        hf_load.read_model_config(write(tmp_path, {"model_type": "gpt2", "n_embd": 64, "n_head": 7}))


def test_a_broken_config_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config.json: broken JSON"):
        hf_load.read_model_config(tmp_path)


def test_folders_are_told_apart(tmp_path):
    write(tmp_path, llama())
    assert hf_load.is_hf_folder(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    assert not hf_load.is_hf_folder(tmp_path)
    assert not hf_load.is_hf_folder(tmp_path / "nothing")


def test_obstacles_name_what_an_architecture_lacks():
    model = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=9, norm=Norm.rmsnorm, qk_norm=True
    )
    assert hf_config.obstacles(model, key_maps.load("gpt2")) == ["norm=rmsnorm", "qk_norm=True"]
    assert "positions=learned" in hf_config.obstacles(model, key_maps.load("llama"))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": None},
        {"mlp_bias": None, "attention_bias": None},
        {"hidden_act": None, "rope_scaling": None, "pretraining_tp": None},
        {"rope_theta": None},
        {"use_cache": None, "num_labels": None, "architectures": None, "head_dim": None},
        *[{key: kind} for key in ("torch_dtype", "dtype") for kind in ("torch.bfloat16", "float32", "auto", None)],
    ],
    ids=str,
)
def test_a_null_is_the_default_and_the_files_know_their_type(tmp_path, changes):
    model, scalar = hf_load.read_model_config(write(tmp_path / "plain", llama()))
    assert hf_load.read_model_config(write(tmp_path / "changed", llama(**changes))) == (model, scalar)


def test_a_null_that_has_a_meaning_keeps_it(tmp_path):
    content = llama(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    assert hf_load.read_model_config(write(tmp_path / "whole", content))[0].num_layers == 4
    with pytest.raises(UserError, match="sliding_window=4096"):
        hf_load.read_model_config(write(tmp_path / "windows", {**content, "sliding_window": 4096}))


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000], ids=["brackets", "digits"])
def test_json_without_end_is_broken(tmp_path, value):
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {value}')
    with pytest.raises(UserError, match=r"config.json: broken JSON"):
        hf_load.read_model_config(tmp_path)


def test_an_index_that_was_left_behind_beside_a_whole_file_is_not_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert set(TensorFiles.open(tmp_path).files) == {"a"}
    save_file({"b": torch.ones(2)}, tmp_path / "more.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}))
    assert set(TensorFiles.open(tmp_path).files) == {"a", "b"}, "an index that counts the file in is of its time"
