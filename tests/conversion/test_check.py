"""The check of a conversion: what it finds, and that it never holds a wide embedding in memory as a whole."""

import dataclasses

import hf_models
import pytest
import torch

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion import convert, key_maps, whole_tensors
from megatron_rlhf.conversion.architecture import Order
from megatron_rlhf.conversion.check import layers as check_layers
from megatron_rlhf.conversion.check import outputs as check_outputs
from megatron_rlhf.conversion.check import tokens as check_tokens
from megatron_rlhf.conversion.check.outputs import CheckFailed, compare_outputs
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.folder import TensorFiles
from megatron_rlhf.conversion.hf.weights import Described, Weights
from megatron_rlhf.parallel.layout import ParallelLayout

CHECK = CheckOptions([5, 6, 7, 8] * 4)


@pytest.mark.parametrize("case", hf_models.ARCHITECTURES)
def test_both_sides_run_the_whole_model(world, tmp_path, case):
    """Against transformers' own model, held in memory: a layer missing on both sides would not show between the two."""
    folder = hf_models.save(tmp_path, case)
    described = Described.read(folder)
    weights = Weights.open(folder, described)
    batches = check_tokens.check_batches(described.model, range(60), 64)
    with torch.no_grad():
        ours = check_layers.run_megatron(described, weights, ParallelLayout.create(ParallelConfig(), range(1)), batches)
        theirs = check_layers.run_transformers(weights, batches)
        for batch, a, b in zip(batches, ours.outcomes, theirs.outcomes, strict=True):
            rows = [tokens[real] for tokens, real in zip(batch.tokens_bs, batch.real_bs, strict=True)]
            whole_model = hf_models.load(folder)
            logits = torch.cat([whole_model(row.unsqueeze(0)).logits[0] for row in rows])
            assert [len(row) for row in rows] in ([64], [60, 21])
            for ran, outcome in ((ours, a), (theirs, b)):
                piece = slice(0, hf_models.VOCABULARY)
                torch.testing.assert_close(ran.head(piece)(outcome.hidden_nh), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama", "gpt2"])  # untied, tied
def test_a_wide_vocabulary_is_never_whole_in_memory(world, tmp_path, monkeypatch, case):
    """Embeddings of both sides are read in pieces, and no model of the check has more rows than it has tokens."""
    monkeypatch.setattr(check_tokens, "PIECE_BYTES", 10 * 64 * 4)
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", 7 * 64 * 4)
    source = hf_models.save(tmp_path / "source", case)
    built, read = [], []
    for name in ("build_chunks", "_hf_model"):
        made = getattr(check_layers, name)
        monkeypatch.setattr(check_layers, name, lambda *args, made=made: built.append(model := made(*args)) or model)
    tensor_read = TensorFiles.read
    embedding = "model.embed_tokens.weight" if case == "llama" else "transformer.wte.weight"

    def watched(files, name, rows=slice(None), columns=slice(None)):
        part = tensor_read(files, name, rows, columns)
        read.append(len(part) if name == embedding else 0)
        return part

    monkeypatch.setattr(TensorFiles, "read", watched)
    monkeypatch.setattr(check_outputs, "CHUNK_BYTES", 9 * 64 * 4)
    check = CheckOptions([5, 6, 7, 8], length=12)
    report = convert.import_huggingface(source, tmp_path / "ours", None, check)
    assert report.largest_difference < 1e-5
    ((ours,), theirs) = built
    assert ours.embedding.word_embeddings.weight.shape[0] == theirs.get_input_embeddings().weight.shape[0] < 25
    assert 0 < max(read) <= 10


@pytest.mark.parametrize("row", [0, 50, 98])
@pytest.mark.parametrize("head", [False, True])
def test_every_row_of_an_embedding_counts_in_the_check(world, tmp_path, monkeypatch, row, head):
    """A row that is wrong on one side only is found: any row of an unembedding; elsewhere, rows of occurring tokens."""
    monkeypatch.setattr(check_tokens, "PIECE_BYTES", 30 * 64 * 4)
    source = hf_models.save(tmp_path / "source", "llama")
    tensor_read, name = TensorFiles.read, "lm_head.weight" if head else "model.embed_tokens.weight"

    def spoiled(files, wanted, rows=slice(None), columns=slice(None)):
        part = tensor_read(files, wanted, rows, columns)
        inside = wanted == name and rows.start is not None and rows.start <= row < rows.stop
        return part.index_fill(0, torch.tensor([row - rows.start]), 3.0) if inside else part

    with convert._into(tmp_path / "ours") as folder:
        described = Described.read(source)
        weights = Weights.open(source, described)
        whole_tensors.write_checkpoint(folder / "policy", weights)
        reader = whole_tensors.CheckpointReader(folder / "policy", described.shapes, described.model.num_layers)
        monkeypatch.setattr(TensorFiles, "read", spoiled)
        batches = check_tokens.check_batches(described.model, range(99), 64)
        with pytest.raises(CheckFailed, match="the final norm or the head" if head else "outputs differ"):
            compare_outputs(reader, weights, ParallelLayout.create(ParallelConfig(), range(1)), batches)


def wrong_table(monkeypatch, key, theirs):
    """Make GPT-2's table wrong, for both import and export: a round trip would never show it."""
    right = key_maps.load("gpt2")
    wrong = dataclasses.replace(right, tensors={**right.tensors, key: theirs})
    monkeypatch.setattr(key_maps.gpt2, "ARCHITECTURE", wrong)


def test_a_wrong_table_fails_the_check_though_it_inverts_itself(world, tmp_path, monkeypatch):
    source = hf_models.save(tmp_path / "source", "gpt2")
    right = key_maps.load("gpt2").tensors["decoder.layers.self_attention.linear_qkv.weight"]
    as_stored = dataclasses.replace(right, order=Order.same)
    wrong_table(monkeypatch, "decoder.layers.self_attention.linear_qkv.weight", as_stored)
    with pytest.raises(CheckFailed, match=r"outputs differ by .* padding on the right; the first to differ is layer 0"):
        convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("field", "value"), [("norm_epsilon", 1e-3), ("rope_base", 20000.0), ("rope_low_frequency", 2.0)]
)
def test_a_wrong_number_fails_the_check(world, tmp_path, monkeypatch, field, value):
    source = hf_models.save(tmp_path / "source", "llama_3.1")
    read = check_layers.ModelConfig
    monkeypatch.setattr(check_layers, "ModelConfig", lambda **fields: read(**{**fields, field: value}))
    with pytest.raises(CheckFailed, match="the first to differ is layer 0"):
        convert.import_huggingface(source, tmp_path / "ours", None, CHECK)
