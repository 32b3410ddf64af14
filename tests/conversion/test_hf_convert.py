"""Conversions from folder to folder: nothing lost, nothing invented, and nothing left behind when they fail."""

import dataclasses
import json
import resource

import hf_models
import pytest
import torch
import torch.distributed as dist
from conversions import CHECK, assert_same_tensors, export, round_trip, save_checkpoint, tensors
from ranks import limited_rank, run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.integrity import NotWritten
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion import convert, whole_tensors
from megatron_rlhf.conversion.architecture import Head
from megatron_rlhf.conversion.check.outputs import CheckFailed
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf import export as hf_export
from megatron_rlhf.conversion.hf import load as hf_load


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


def export_where_one_rank_cannot_read(checkpoint, output):
    if dist.get_rank() == 1:
        read = whole_tensors.CheckpointReader.read

        def fail(reader, place, *rows):
            if place.layer == 2:
                raise UserError(f"{place} cannot be read here")
            return read(reader, place, *rows)

        whole_tensors.CheckpointReader.read = fail
    try:
        export(checkpoint, output, shard_bytes=20_000)
    except UserError as error:
        return str(error)


def test_what_one_rank_cannot_read_all_ranks_tell(world, tmp_path):
    source = hf_models.save(tmp_path / "source", "gpt2")
    convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    messages = run_ranks(2, export_where_one_rank_cannot_read, tmp_path / "ours", tmp_path / "theirs")
    assert all("layers.2" in message for message in messages), messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def convert_with_one_full_disk(source, folder, rank, size):
    """The messages that a rank gets of an import and of an export, then what is left once there is room."""
    said = []
    for attempt in (
        lambda: convert.import_huggingface(source, folder / "ours", None, CHECK),
        lambda: export(folder / "ours", folder / "theirs", shard_bytes=20_000),
    ):
        limited_rank(rank, size)
        with pytest.raises(NotWritten) as caught:
            attempt()
        said.append(str(caught.value))
        limited_rank(rank, resource.RLIM_INFINITY)
        assert list(folder.iterdir()) == [folder / "ours"] * (len(said) - 1)
        dist.barrier()
        attempt()
    return said


# The first rank writes descriptions too: at which file it fails depends on how much room there is.
@pytest.mark.parametrize(("rank", "size"), [(1, 5000), (0, 5000), (0, 0)])
def test_a_full_disk_on_one_rank_is_told_to_all(tmp_path, rank, size):
    source, folder = hf_models.save(tmp_path / "source", "gpt2"), tmp_path / "converted"
    folder.mkdir()
    for said in run_ranks(2, convert_with_one_full_disk, source, folder, rank, size):
        assert all("File too large" in text and text.endswith(f"(rank {rank})") for text in said), said


def import_on_ranks(source, output, parallel):
    convert.import_huggingface(source, output, None, CHECK)
    model, _ = hf_load.read_model_config(source)
    role, reference = make_role(model, parallel), make_role(model, parallel)
    sharded.load_weights(output, role, "policy")
    hf_load.load_into(reference, source)
    return all(
        torch.equal(a, b)
        for one, other in zip(role.modules, reference.modules, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_an_imported_checkpoint_loads_at_any_layout(tmp_path):
    source = hf_models.save(tmp_path / "source", "qwen3")
    parallel = ParallelConfig(tensor=2, pipeline=2)
    assert run_ranks(4, import_on_ranks, source, tmp_path / "ours", parallel) == [True] * 4


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
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", 5000)
    convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    model, _ = hf_load.read_model_config(source)
    role, reference = make_role(model, seed=1), make_role(model, seed=2)
    sharded.load_weights(tmp_path / "ours", role, "policy")
    hf_load.load_into(reference, source)
    for one, other in zip(role.modules[0].parameters(), reference.modules[0].parameters(), strict=True):
        assert torch.equal(one, other)
    export(tmp_path / "ours", tmp_path / "theirs")
    assert_same_tensors(source, tmp_path / "theirs")


@pytest.mark.parametrize("length", [1000, None], ids=["cut", "one_bit"])
def test_a_damaged_checkpoint_is_named(world, tmp_path, length):
    save_checkpoint(tmp_path / "ours", ParallelConfig(), {"policy": (LLAMA_LIKE, False, 0)})
    (data,) = (tmp_path / "ours" / "policy").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content[:length])
    with pytest.raises(
        UserError, match=rf"ours: the checkpoint is damaged: policy/{data.name} is not what was written"
    ):
        export(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_tokenizer_of_another_model_is_refused(world, tmp_path):
    source = hf_models.save(tmp_path / "source", "gpt2")
    with pytest.raises(UserError, match="gives token 99, but the model knows 99"):
        convert.import_huggingface(source, tmp_path / "ours", None, CheckOptions([5, 99]))


def test_a_tensor_that_was_written_wrongly_is_named(world, tmp_path, monkeypatch):
    source = hf_models.save(tmp_path / "source", "gpt2")
    convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    save = hf_export.write_tensors

    def spoil(path, tensors):
        tensors["transformer.h.2.mlp.c_fc.bias"][3] += 1e-6
        save(path, tensors)

    monkeypatch.setattr(hf_export, "write_tensors", spoil)
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
