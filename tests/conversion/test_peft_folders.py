"""Adapters as folders: from `peft` into a role, out of a checkpoint into `peft`, and merged into a Hugging Face folder."""

import json

import hf_models
import peft
import pytest
import torch
import transformers
from conversions import CHECK
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_hf_training import LENGTHS, PROMPTS
from test_peft import LLAMA_NAMES, adapted, load_role, sequences
from toys import make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.models.microbatches import TokenBatch

TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "pythia": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
# Log-probabilities of up to 10 nats from wide random weights, summed in another order: measured up to 3e-5.
TOLERANCE = 1e-4


def theirs(model):
    """Log-probabilities of every token after the prompts, in one row."""
    rows = []
    with torch.no_grad():
        for tokens, prompt in zip(sequences(hf_models.VOCABULARY), PROMPTS, strict=True):
            logprobs = model.eval()(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            rows.append(logprobs[range(prompt - 1, len(tokens) - 1), tokens[prompt:]])
    return torch.cat(rows)


def ours(role):
    batch = TokenBatch.pack(sequences(hf_models.VOCABULARY), PROMPTS)
    logprobs = role.logprobs(batch.sequences, 2)
    return torch.cat([row[p - 1 : n - 1] for row, n, p in zip(logprobs, LENGTHS, PROMPTS, strict=True)])


def started(folder, parallel, merged):
    role = load_role(folder, parallel)
    if merged:
        role.merge_adapters()
    return ours(role)


@pytest.mark.parametrize("case", hf_models.ARCHITECTURES)
def test_a_folder_of_peft_is_a_starting_point(case, world, tmp_path):
    base = hf_models.save(tmp_path / "base", case)
    model = adapted(base, tmp_path / "adapter", TARGETS.get(case, list(LLAMA_NAMES)))
    expected = theirs(model)
    assert (expected - theirs(model.unload())).abs().max() > 0.1, "the adapters matter"
    for merged in (False, True):
        assert (started(tmp_path / "adapter", None, merged) - expected).abs().max() < TOLERANCE, f"merged: {merged}"


@pytest.mark.parametrize("case", ["gpt2", "llama_3.1"])
def test_a_folder_of_peft_over_ranks(case, tmp_path):
    base = hf_models.save(tmp_path / "base", case)
    expected = theirs(adapted(base, tmp_path / "adapter", TARGETS.get(case, list(LLAMA_NAMES))))
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=2)
    for merged in (False, True):
        for found in run_ranks(4, started, tmp_path / "adapter", parallel, merged):
            assert (found - expected).abs().max() < TOLERANCE


def trained_checkpoint(base, targets, folder):
    """A role with adapters of some projections, as if trained."""
    source = StartingPoint.find(str(base), "policy.init_from", POLICY)
    from megatron_rlhf.config.lora import LoraConfig

    adapter = LoraConfig(rank=3, alpha=6.0, targets=targets).adapter(source.model, "policy.lora")
    role = make_role(source.model, adapter=adapter)
    source.load_into(role)
    with torch.no_grad():
        for name, parameter in role.modules[0].named_parameters():
            if "_adapter." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, sharded.SavedRole(role))
        sharded.write_meta(aside, {"policy": role}, {})
    return role


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("case", hf_models.ARCHITECTURES)
def test_a_checkpoint_is_written_for_peft_and_merged(case, targets, world, tmp_path):
    base, checkpoint = hf_models.save(tmp_path / "base", case), tmp_path / "checkpoint"
    expected = ours(trained_checkpoint(base, targets, checkpoint))
    extra = ExtraFiles.find(checkpoint, base)
    said = convert.export_peft(checkpoint, tmp_path / "adapter", "policy", None, extra, str(base))
    assert "whose weights are the checkpoint's" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert (theirs(model) - expected).abs().max() < TOLERANCE
    again = StartingPoint.find(str(tmp_path / "adapter"), "policy.init_from", POLICY)
    assert again.adapter.rank == 3
    assert (started(tmp_path / "adapter", None, False) - expected).abs().max() < TOLERANCE
    for with_adapter, same in ((True, expected), (False, theirs(hf_models.load(base)))):
        output = tmp_path / f"whole_{with_adapter}"
        convert.export_huggingface(checkpoint, output, "policy", None, None, extra, CHECK, with_adapter=with_adapter)
        assert (theirs(hf_models.load(output)) - same).abs().max() < TOLERANCE


def refuse(folder, says):
    with pytest.raises(UserError, match=says):
        StartingPoint.find(str(folder), "policy.init_from", POLICY)


def changed(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": "gone/away"}, r"policy\.init_from=.*base_model_name_or_path=gone/away"),
        ({"alpha_pattern": {"q_proj": 3}}, "several ranks or scales"),
        ({"alpha_pattern": {"(q_proj": 3}}, r"alpha_pattern: '\(q_proj' must be a regular expression: missing \)"),
        ({"rank_pattern": {"*": 3}}, r"rank_pattern: '\*' must be a regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_settings_that_mean_something_else_are_refused(settings, says, tmp_path):
    base = hf_models.save(tmp_path / "base", "llama")
    adapted(base, tmp_path / "adapter", list(LLAMA_NAMES))
    refuse(changed(tmp_path / "adapter", **settings), says)


def broken(tensors, name):
    if name == "shape":
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(63, 4)
    elif name == "inputs":
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 63)
    elif name == "half":
        del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
    elif name == "layer":
        for which in "AB":
            del tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{which}.weight"]
    elif name == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 99)
    return tensors


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shape", r"q_proj is \[4, 64\] and \[63, 4\]"),
        ("inputs", r"up_proj is \[4, 63\]"),
        ("half", "no counterpart"),
        ("layer", "layer 1 has adapters for other projections"),
        ("embedding", "embed_tokens.* adapts nothing"),
    ],
)
def test_tensors_of_another_shape_are_refused(what, says, tmp_path):
    base = hf_models.save(tmp_path / "base", "llama")
    adapted(base, tmp_path / "adapter", list(LLAMA_NAMES))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(broken(load_file(path), what), path)
    refuse(tmp_path / "adapter", says)


def test_rank_stabilised_scales_are_read(world, tmp_path):
    base = hf_models.save(tmp_path / "base", "llama")
    model = adapted(base, tmp_path / "adapter", ["q_proj", "v_proj"], use_rslora=True)
    assert (started(tmp_path / "adapter", None, False) - theirs(model)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 9, "v_proj": 9},
        {"(q|v)_proj": 9},
        {r"^model\.layers\.\d+\.self_attn\.[qv]_proj": 9},
        {r".*\.[qv]_proj": 9, "q_proj": 3},
        {"proj": 9, "self_attn": 3},
    ],
)
def test_scales_by_pattern_are_those_of_peft(pattern, tmp_path):
    base = hf_models.save(tmp_path / "base", "llama")
    model = adapted(base, tmp_path / "adapter", ["q_proj", "v_proj"], alpha_pattern=pattern)
    scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert StartingPoint.find(str(tmp_path / "adapter"), "policy.init_from", POLICY).adapter.scale == scale


def test_adapters_of_a_damaged_checkpoint_are_not_written(world, tmp_path):
    base, checkpoint = hf_models.save(tmp_path / "base", "llama"), tmp_path / "checkpoint"
    trained_checkpoint(base, [], checkpoint)
    path = next((checkpoint / "policy").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"checkpoint is damaged: policy/{path.name} is not what was written"):
        convert.export_peft(checkpoint, tmp_path / "a", "policy", None, ExtraFiles.find(checkpoint, base), str(base))
    assert not (tmp_path / "a").exists()


def test_the_base_must_be_the_one_that_was_trained(world, tmp_path):
    base, checkpoint = hf_models.save(tmp_path / "base", "llama"), tmp_path / "checkpoint"
    trained_checkpoint(base, [], checkpoint)
    other = tmp_path / "other"
    hf_models.build("llama", hidden_act="silu").half().float().save_pretrained(other)
    with pytest.raises(UserError, match="is not the one that the adapters were trained beside"):
        convert.export_peft(checkpoint, tmp_path / "a", "policy", None, ExtraFiles.find(checkpoint, base), str(other))
    assert not (tmp_path / "a").exists()
