"""Hugging Face folders read straight into roles, at every kind of layout."""

import json
import logging

import hf_models
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from toys import make_role

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf import load as hf_load

# Sums in another order: logits of up to 30 agree to a few units in the last place of fp32.
TOLERANCE = 1e-4
LAYOUTS = {
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual_stages=2)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "tp4": (4, ParallelConfig(tensor=4)),
    "dp2": (2, ParallelConfig()),
}


def tokens():
    return torch.randint(hf_models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))


def expected(folder):
    with torch.no_grad():
        logits = hf_models.load(folder)(tokens()).logits
    return logits.log_softmax(-1)[:, :-1].gather(-1, tokens()[:, 1:, None]).squeeze(-1)


def role_from(folder, parallel=None, scalar=False, multiple=1, precision=Precision.fp32):
    model, _ = hf_load.read_model_config(folder)
    model.vocab_multiple = multiple
    role = make_role(model, parallel, scalar=scalar, precision=precision)
    hf_load.load_into(role, folder)
    return role


def logprobs(folder, parallel=None, multiple=1):
    return role_from(folder, parallel, multiple=multiple).logprobs(tokens(), 2)


def values(folder, parallel=None):
    return role_from(folder, parallel, scalar=True).values(tokens(), 2)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_logprobs_are_those_of_transformers(world, tmp_path, case):
    folder = hf_models.save(tmp_path, case)
    torch.testing.assert_close(logprobs(folder, multiple=64), expected(folder), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("tp2_sp", "llama_3.1"),
        ("tp2_pp2", "gpt2"),
        ("tp2_pp2", "qwen3"),
        *[
            pytest.param(layout, case, marks=pytest.mark.slow)
            for layout in LAYOUTS
            for case in hf_models.ARCHITECTURES
            if not (layout == "tp4" and hf_models.CASES[case][1].get("num_key_value_heads") == 2)
        ],
    ],
)
def test_logprobs_at_other_layouts(tmp_path, layout, case):
    folder = hf_models.save(tmp_path, case)
    size, parallel = LAYOUTS[layout]
    for result in run_ranks(size, logprobs, folder, parallel, 3):
        torch.testing.assert_close(result, expected(folder), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("head", ["score", "token"])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_scalar_heads_give_the_same_number_at_every_token(world, tmp_path, case, head):
    folder = hf_models.save(tmp_path, case, head)
    model = hf_models.load(folder, head)
    with torch.no_grad():
        hidden = model.base_model(tokens()).last_hidden_state
        scores = (model.score if hasattr(model, "score") else model.classifier)(hidden).squeeze(-1)
    torch.testing.assert_close(values(folder), scores, atol=TOLERANCE, rtol=0)


def test_a_scalar_head_at_two_by_two_ranks(tmp_path):
    folder = hf_models.save(tmp_path, "gpt2", "token")
    one = run_ranks(1, values, folder)[0]
    for result in run_ranks(4, values, folder, ParallelConfig(tensor=2, pipeline=2)):
        torch.testing.assert_close(result, one, atol=TOLERANCE, rtol=0)


def test_a_language_model_leaves_the_new_head_alone(world, tmp_path, caplog):
    folder = hf_models.save(tmp_path, "llama")  # untied: its unembedding is left out
    model, _ = hf_load.read_model_config(folder)
    role = make_role(model, name="value", scalar=True)
    before = role.modules[0].output_layer.weight.clone()
    with caplog.at_level(logging.INFO):
        hf_load.load_into(role, folder)
    assert torch.equal(role.modules[0].output_layer.weight, before)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(role.modules[0].embedding.word_embeddings.weight, embeddings)
    assert "value: the scalar head is new" in caplog.text


def test_a_language_model_cannot_come_from_a_reward_model(world, tmp_path):
    folder = hf_models.save(tmp_path, "gpt2", "score")
    with pytest.raises(UserError, match="policy needs a language model"):
        role_from(folder)


def test_types_are_converted_to_the_role_s(world, tmp_path):
    folder = hf_models.save(tmp_path, "gpt2", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert stored.dtype is torch.bfloat16
    assert torch.equal(role_from(folder).modules[0].embedding.word_embeddings.weight, stored.float())
    half = role_from(folder, precision=Precision.bf16).modules[0].embedding.word_embeddings.weight
    assert torch.equal(half, stored)


def test_sharded_files_and_a_base_model_without_head(world, tmp_path):
    whole = hf_models.save(tmp_path / "whole", "gpt2")
    hf_models.build("gpt2").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    hf_models.build("gpt2").transformer.save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    reference = logprobs(whole)
    for folder in ("shards", "base"):
        assert torch.equal(logprobs(tmp_path / folder), reference), folder


def change(folder, edit):
    """Rewrite a folder's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def test_buffers_of_old_files_and_a_repeated_unembedding_are_accepted(world, tmp_path):
    folder = hf_models.save(tmp_path, "gpt2")
    reference = logprobs(folder)

    def as_of_old(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    change(folder, as_of_old)
    assert torch.equal(logprobs(folder), reference)


def untie(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


WRONG = {
    "missing": (
        lambda tensors: tensors.pop("transformer.h.2.mlp.c_fc.bias"),
        "tensor transformer.h.2.mlp.c_fc.bias [256] is missing",
    ),
    "extra": (
        lambda tensors: tensors.update({"transformer.h.4.ln_1.weight": torch.ones(64)}),
        "does not call for tensor transformer.h.4.ln_1.weight",
    ),
    "shape": (
        lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(32, 64)}),
        "tensor transformer.wpe.weight is [32, 64]; config.json calls for [64, 64]",
    ),
    "quantized": (
        lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(64, 64).to(torch.int8)}),
        "tensor transformer.wpe.weight is torch.int8: quantized, not supported",
    ),
    "untied": (untie, "lm_head.weight; it differs from the embeddings that it should repeat"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_contradict_config_json(world, tmp_path, wrong):
    edit, message = WRONG[wrong]
    folder = hf_models.save(tmp_path, "gpt2")
    change(folder, edit)
    with pytest.raises(UserError) as caught:
        logprobs(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_types_that_differ_between_layers_are_no_matter_to_training_but_to_a_conversion(world, tmp_path):
    folder = hf_models.save(tmp_path / "source", "gpt2")
    change(folder, lambda tensors: tensors.update({"transformer.h.2.ln_1.bias": torch.ones(64)}))
    reference = logprobs(folder)
    change(folder, lambda tensors: tensors.update({"transformer.h.2.ln_1.bias": torch.ones(64).bfloat16()}))
    assert torch.equal(logprobs(folder), reference)
    with pytest.raises(UserError, match=r"h\.2\.ln_1\.bias is torch\.bfloat16, its like elsewhere torch\.float32"):
        convert.import_huggingface(folder, tmp_path / "ours", None, CheckOptions())


def test_config_json_that_contradicts_the_tensors(world, tmp_path):
    folder = hf_models.save(tmp_path, "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_key_value_heads": 4}))
    with pytest.raises(UserError, match=r"k_proj.weight is \[32, 64\]; config.json calls for \[64, 64\]"):
        logprobs(folder)


def test_files_that_are_missing_torn_or_unlisted(world, tmp_path):
    hf_models.build("gpt2").save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{shard.name}: not a whole safetensors file"):
        logprobs(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: this file of the model is missing"):
        logprobs(tmp_path)
    shard.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    dropped = next(name for name, file in content["weight_map"].items() if file == shard.name)
    del content["weight_map"][dropped]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"holds {dropped}, which"):
        logprobs(tmp_path)
    for broken in ({}, {"weight_map": [shard.name]}, {"weight_map": {dropped: 3}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="weight_map must name the file of every tensor"):
            logprobs(tmp_path)


def test_pickled_weights_are_not_read(world, tmp_path):
    model = hf_models.build("gpt2")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow-pickle"):
        logprobs(tmp_path)
