"""Conversions from folder to folder: nothing lost, nothing invented, and nothing left behind when they fail."""

import dataclasses
import json
import shutil
from pathlib import Path

import hf_models
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.checkpoint import convert, hf, hf_export, key_maps, sharded, whole
from megatron_rlhf.checkpoint.architecture import Head
from megatron_rlhf.checkpoint.companions import Companions
from megatron_rlhf.checkpoint.convert import CheckOptions
from megatron_rlhf.checkpoint.hf_check import CheckFailed
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig

CHECK = CheckOptions([5, 6, 7, 8] * 4)


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_tensors(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def export(
    checkpoint, output, role="policy", architecture=None, dtype=None, shard_bytes=hf_export.SHARD_BYTES, like=None
):
    companions = Companions.find(checkpoint, like)
    return convert.export_huggingface(checkpoint, output, role, architecture, dtype, companions, CHECK, shard_bytes)


def round_trip(source, work, role, shard_bytes=hf_export.SHARD_BYTES):
    imported = convert.import_huggingface(source, work / "ours", None, CHECK)
    exported = export(work / "ours", work / "theirs", role, shard_bytes=shard_bytes)
    return imported, exported


def save_checkpoint(folder, parallel, roles):
    """Write a checkpoint with these roles: name -> (shape, scalar, bias of the scalar head)."""
    built = {}
    for name, (model, scalar, bias) in roles.items():
        built[name] = make_role(model, parallel, name=name, scalar=scalar, seed=len(built))
        if scalar and built[name].layout.is_last_stage:
            with torch.no_grad():
                built[name].modules[-1].output_layer.bias.fill_(bias)
    with sharded.writing(folder) as temporary:
        for role in built.values():
            sharded.save_role(temporary, sharded.SavedRole(role))
        sharded.write_meta(temporary, built, {})


@pytest.mark.parametrize("case", hf_models.CASES)
def test_a_round_trip_is_bit_identical(world, tmp_path, case):
    source = hf_models.save(tmp_path / "source", case)
    model_type = hf_models.CASES[case][0]
    imported, exported = round_trip(source, tmp_path, "policy", shard_bytes=60_000)
    assert exported.architecture == model_type
    assert imported.tensors == exported.tensors == len(tensors(source))
    assert (imported.architecture, imported.head) == (model_type, Head.language)
    assert 0 <= imported.largest_difference <= 1e-4
    assert_same_tensors(source, tmp_path / "theirs")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "theirs"))
    assert {k: v for k, v in after.items() if v is not None} == {k: v for k, v in before.items() if v is not None}
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(source).keys()
    assert all((tmp_path / "theirs" / file).stat().st_size < 80_000 for file in index["weight_map"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(world, tmp_path, dtype):
    source = hf_models.save(tmp_path / "source", "llama", dtype=dtype)
    round_trip(source, tmp_path, "policy")
    assert_same_tensors(source, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("head", "role"), [("score", "reward"), ("token", "value")], ids=["reward model", "value model"]
)
@pytest.mark.parametrize("case", hf_models.ARCHITECTURES)
def test_heads_make_the_round_trip(world, tmp_path, case, head, role):
    model_type = hf_models.CASES[case][0]
    if head == "token" and key_maps.load(model_type).token_head is None:
        pytest.skip(f"transformers has no token classifier of {model_type}")
    source = hf_models.save(tmp_path / "source", case, head)
    imported, _ = round_trip(source, tmp_path, role)
    assert imported.head is Head[head]
    assert_same_tensors(source, tmp_path / "theirs")


def test_opt_has_no_class_for_a_value_model(world, tmp_path):
    round_trip(hf_models.save(tmp_path / "source", "opt", "score"), tmp_path, "reward")
    ours = tmp_path / "ours"
    (ours / "reward").rename(ours / "value")
    meta = json.loads((ours / "meta.json").read_text())
    (ours / "meta.json").write_text(json.dumps({**meta, "roles": {"value": meta["roles"]["reward"]}}))
    with pytest.raises(UserError, match="transformers has no OPTForTokenClassification"):
        export(ours, tmp_path / "value", "value", "opt")
    assert not (tmp_path / "value").exists()


@pytest.mark.parametrize(("model", "needs_code"), [(GPT2_LIKE, False), (LLAMA_LIKE, True)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_reward_model_scores_texts_as_ours_does(world, tmp_path, model, needs_code, dtype):
    """The bias that makes demonstrations score 0 is kept, though transformers' classes have no place for it."""
    save_checkpoint(tmp_path / "ours", ParallelConfig(), {"reward": (model, True, 1.75)})
    report = export(tmp_path / "ours", tmp_path / "theirs", "reward", dtype=dtype)
    role = make_role(model, name="reward", scalar=True)
    sharded.load_weights(tmp_path / "ours", role, "reward")
    if dtype is not None:
        for parameter in role.modules[0].parameters():
            parameter.data = parameter.data.to(dtype).float()
    tokens = torch.randint(model.vocab_size, (4, 11), generator=torch.Generator().manual_seed(3))
    theirs = hf_models.load(tmp_path / "theirs", "score", trust_remote_code=needs_code)
    with torch.no_grad():
        scores = torch.stack([theirs(row.unsqueeze(0)).logits[0, 0] for row in tokens])
    torch.testing.assert_close(scores, role.values(tokens, 4)[:, -1], atol=1e-5, rtol=1e-5)
    assert (tmp_path / "theirs" / "modeling_reward.py").exists() == needs_code
    assert ("load the model with trust_remote_code=True" in str(report)) == needs_code
    if needs_code:  # the bias is the one thing that transformers' own class leaves out
        plain = hf_models.load(tmp_path / "theirs", "score")
        with torch.no_grad():
            without = (
                plain(tokens[:1]).logits[0, 0]
                + load_file(tmp_path / "theirs" / "model.safetensors")["score.bias"].float()
            )
        torch.testing.assert_close(without[0], scores[0])


def test_a_score_is_never_read_at_padding(world, tmp_path):
    """Where the end of text doubles as padding, transformers would read the score one token early."""
    source = hf_models.build("gpt2", "score", eos_token_id=98, pad_token_id=98)
    source.save_pretrained(tmp_path / "source")
    round_trip(tmp_path / "source", tmp_path, "reward")
    theirs = hf_models.load(tmp_path / "theirs", "score")
    text = torch.tensor([[4, 5, 6, 98]])
    with torch.no_grad():
        hidden = theirs.base_model(text).last_hidden_state
        assert torch.equal(theirs(text).logits[0], theirs.score(hidden)[0, -1])
        with pytest.raises(ValueError, match="padding"):
            theirs(text.expand(2, -1))


def test_roles_of_one_checkpoint(world, tmp_path):
    roles = {"policy": (LLAMA_LIKE, False, 0), "policy_ema": (LLAMA_LIKE, False, 0), "value": (LLAMA_LIKE, True, 0.5)}
    save_checkpoint(tmp_path / "ours", ParallelConfig(), roles)
    for role in roles:
        export(tmp_path / "ours", tmp_path / role, role)
    policy, average = tensors(tmp_path / "policy"), tensors(tmp_path / "policy_ema")
    assert policy.keys() == average.keys()
    assert not torch.equal(policy["lm_head.weight"], average["lm_head.weight"])
    value = hf_models.load(tmp_path / "value", "token")
    assert float(value.score.bias) == 0.5
    with pytest.raises(UserError, match=r"--role reward: .* holds policy, ema, value"):
        export(tmp_path / "ours", tmp_path / "reward", "reward")


def export_on_ranks(checkpoint, output, parallel, model):
    save_checkpoint(checkpoint, parallel, {"policy": (model, False, 0)})
    return export(checkpoint, output, shard_bytes=20_000).tensors


@pytest.mark.parametrize("model", [GPT2_LIKE, LLAMA_LIKE], ids=["gpt2", "llama"])
def test_export_from_any_layout_on_many_ranks(tmp_path, model):
    model = dataclasses.replace(model, vocab_multiple=16)  # 67 tokens: 80 rows on one rank, 96 on two
    one = run_ranks(1, export_on_ranks, tmp_path / "one", tmp_path / "from_one", ParallelConfig(), model)
    parallel = ParallelConfig(tensor=2, pipeline=2)
    four = run_ranks(4, export_on_ranks, tmp_path / "four", tmp_path / "from_four", parallel, model)
    assert set(one + four) == {len(tensors(tmp_path / "from_one"))}
    assert_same_tensors(tmp_path / "from_one", tmp_path / "from_four")
    embeddings = "transformer.wte.weight" if model.tied_embeddings else "model.embed_tokens.weight"
    assert tensors(tmp_path / "from_four")[embeddings].shape == (67, 32)


def import_on_ranks(source, output, parallel):
    convert.import_huggingface(source, output, None, CHECK)
    model, _ = hf.read_model_config(source)
    role, reference = make_role(model, parallel), make_role(model, parallel)
    sharded.load_weights(output, role, "policy")
    hf.load_into(reference, source)
    return all(
        torch.equal(a, b)
        for one, other in zip(role.modules, reference.modules, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_an_imported_checkpoint_loads_at_any_layout(tmp_path):
    source = hf_models.save(tmp_path / "source", "qwen3")
    parallel = ParallelConfig(tensor=2, pipeline=2)
    assert run_ranks(4, import_on_ranks, source, tmp_path / "ours", parallel) == [True] * 4


def test_companions_travel_along(world, tmp_path, shared_data):
    source = tmp_path / "source"
    shutil.copytree(shared_data / "tinystories_260k", source)
    (source / "generation_config.json").write_text('{"do_sample": true}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "notes.txt").write_text("not a companion")
    round_trip(source, tmp_path, "policy")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "theirs" / name).read_bytes() == (source / name).read_bytes(), name
    more = Path("additional_chat_templates", "tools.jinja")
    assert (tmp_path / "theirs" / more).read_text() == "{{ tools }}"
    assert not (tmp_path / "theirs" / "notes.txt").exists()


def test_companions_are_found_through_the_runs_that_a_checkpoint_comes_from(tmp_path):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for folder, name in ((model, "config.json"), (tokenizer, "tokenizer.json")):
        folder.mkdir()
        (folder / name).write_text('{"model_type": "mistral"}')
    for run, origin in (("sft", model), ("ppo", tmp_path / "sft")):
        (tmp_path / run / "checkpoints" / "step_3").mkdir(parents=True)
        config = f"data: {{tokenizer: {tokenizer}}}\npolicy: {{init_from: {origin}}}\nreward: {{init_from: null}}"
        (tmp_path / run / "config.yaml").write_text(config)
    found = Companions.find(tmp_path / "ppo" / "checkpoints" / "step_3", None)
    assert (found.tokenizer, found.config, found.model_type) == (tokenizer, model, "mistral")
    assert Companions.find(tmp_path / "ppo" / "checkpoints" / "step_3", like=model).tokenizer is None


def test_a_shape_that_no_architecture_has(world, tmp_path):
    save_checkpoint(
        tmp_path / "ours", ParallelConfig(), {"policy": (dataclasses.replace(GPT2_LIKE, qk_norm=True), False, 0)}
    )
    with pytest.raises(UserError, match=r"gpt2 lacks qk_norm=True"):
        export(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(UserError, match=r"llama lacks positions=learned"):
        export(tmp_path / "ours", tmp_path / "theirs", architecture="llama")
    assert not (tmp_path / "theirs").exists()


def test_a_checkpoint_in_chunks_is_the_same(world, tmp_path, monkeypatch):
    source = hf_models.save(tmp_path / "source", "qwen3")
    monkeypatch.setattr(whole, "CHUNK_BYTES", 5000)
    convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    model, _ = hf.read_model_config(source)
    role, reference = make_role(model, seed=1), make_role(model, seed=2)
    sharded.load_weights(tmp_path / "ours", role, "policy")
    hf.load_into(reference, source)
    for one, other in zip(role.modules[0].parameters(), reference.modules[0].parameters(), strict=True):
        assert torch.equal(one, other)
    export(tmp_path / "ours", tmp_path / "theirs")
    assert_same_tensors(source, tmp_path / "theirs")


def test_a_damaged_checkpoint_is_named(world, tmp_path):
    save_checkpoint(tmp_path / "ours", ParallelConfig(), {"policy": (LLAMA_LIKE, False, 0)})
    for data in (tmp_path / "ours" / "policy").glob("*.distcp"):
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"policy: the checkpoint is damaged, .* cannot be read"):
        export(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_tokenizer_of_another_model_is_refused(world, tmp_path):
    source = hf_models.save(tmp_path / "source", "gpt2")
    with pytest.raises(UserError, match="gives token 99, but the model knows 99"):
        convert.import_huggingface(source, tmp_path / "ours", None, CheckOptions([5, 99]))


def test_a_tensor_that_was_written_wrongly_is_named(world, tmp_path, monkeypatch):
    source = hf_models.save(tmp_path / "source", "gpt2")
    convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    save = hf_export.save_file

    def spoil(tensors, *args, **kwargs):
        tensors["transformer.h.2.mlp.c_fc.bias"][3] += 1e-6
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(hf_export, "save_file", spoil)
    with pytest.raises(
        CheckFailed, match=r"tensor transformer.h.2.mlp.c_fc.bias .* differs: 1 of 256 values, by up to"
    ):
        export(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_an_interruption_leaves_nothing(world, tmp_path, monkeypatch):
    source = hf_models.save(tmp_path / "source", "gpt2")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "compare_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_output_that_is_not_empty_is_left_alone(world, tmp_path):
    source = hf_models.save(tmp_path / "source", "gpt2")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    assert (tmp_path / "ours" / "precious").read_text() == "x"


def test_pickled_weights_are_read_when_allowed(world, tmp_path):
    model = hf_models.build("gpt2")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "source")
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    convert.import_huggingface(tmp_path / "source", tmp_path / "ours", None, CHECK, allow_pickle=True)
    export(tmp_path / "ours", tmp_path / "theirs")
    for name, tensor in tensors(tmp_path / "theirs").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


class Malicious:
    def __reduce__(self):
        return (print, ("code was run",))


def test_pickled_code_is_never_run(world, tmp_path, capsys):
    model = hf_models.build("gpt2")
    model.config.save_pretrained(tmp_path / "source")
    torch.save({**model.state_dict(), "extra": Malicious()}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds pickled objects other than tensors"):
        convert.import_huggingface(tmp_path / "source", tmp_path / "ours", None, CHECK, allow_pickle=True)
    assert "code was run" not in capsys.readouterr().out
