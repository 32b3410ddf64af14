"""Distributed checkpoints in zarr format, as found in NeMo's archives."""

import itertools
import json
import shutil

import pytest
import torch
from test_nemo import CONFIGS, pack, weights
from toys import LLAMA_LIKE

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion import convert, whole_tensors
from megatron_rlhf.conversion.architecture import is_layer, tensor_shapes
from megatron_rlhf.conversion.whole_tensors import Place


def write_zarr(folder, tensor, chunks, dtype):
    """One array as zarr 2.18 writes it uncompressed: whole chunks, also at the edges; zeros are written like the rest."""
    folder.mkdir(parents=True)
    description = {"chunks": chunks, "compressor": None, "dtype": dtype, "fill_value": None, "filters": None}
    description |= {"order": "C", "shape": list(tensor.shape), "zarr_format": 2}
    (folder / ".zarray").write_text(json.dumps(description))
    grid = [range(-(-size // n)) for size, n in zip(tensor.shape, chunks, strict=True)]
    for place in itertools.product(*grid):
        chunk = torch.zeros(chunks, dtype=tensor.dtype)
        part = tensor[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, chunks, strict=True))]
        chunk[tuple(map(slice, part.shape))] = part
        (folder / ".".join(map(str, place))).write_bytes(chunk.view(torch.uint8).numpy().tobytes())


def zarr_archive(tmp_path, whole, dtype=torch.float32, edit=lambda folder: None):
    folder = tmp_path / "content" / "model_weights"
    for key in tensor_shapes(LLAMA_LIKE, scalar=False):
        layers = [whole[Place(key, i)] for i in range(4)] if is_layer(key) else None
        tensor = (torch.stack(layers) if layers else whole[Place(key, None)]).to(dtype)
        # As two tensor-parallel ranks shard it; the vocabulary does not divide into such pieces.
        chunks = [1, *tensor.shape[1:]] if layers else [-(-tensor.shape[0] // 2), *tensor.shape[1:]]
        chunks[-1] = max(chunks[-1] // 2, 1)
        write_zarr(folder / f"model.{key}", tensor, chunks, "bfloat16" if dtype is torch.bfloat16 else "<f4")
    (folder / "model.decoder.layers.self_attention._extra_state").mkdir()
    edit(folder)
    return pack(tmp_path / "model.nemo", CONFIGS["llama"], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zarr_inside_an_archive(world, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", 1000)  # rows are requested piece by piece
    whole = weights(LLAMA_LIKE)
    archive = zarr_archive(tmp_path, whole, dtype)
    assert convert.import_nemo(archive, tmp_path / "ours") == len(whole)
    reader = whole_tensors.CheckpointReader(tmp_path / "ours" / "policy", tensor_shapes(LLAMA_LIKE, scalar=False), 4)
    for place, tensor in whole.items():
        assert torch.equal(reader.read(place), tensor.to(dtype)), place


def describe(**changes):
    def edit(folder):
        path = folder / "model.decoder.final_layernorm.weight" / ".zarray"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (describe(compressor={"id": "blosc"}), r"compressor={'id': 'blosc'} is not supported"),
        (describe(dtype="<i4"), r"dtype=<i4 is not supported"),
        (describe(shape=[33]), r"is \[33\]; the model's shape wants \[32\]"),
        (
            lambda folder: (folder / "model.decoder.layers.mlp.linear_fc2.weight" / "3.0.0").write_bytes(b"1234"),
            r"3.0.0: not a whole chunk: 4 bytes instead of",
        ),
        (
            lambda folder: (folder / "model.decoder.layers.mlp.linear_fc2.weight" / "2.0.1").unlink(),
            r"2.0.1: not a whole chunk: 0 bytes",
        ),
        (
            lambda folder: write_zarr(folder / "model.decoder.post_norm.weight", torch.ones(4), [4], "<f4"),
            r"model_config.yaml does not call for tensor decoder.post_norm.weight",
        ),
        (lambda folder: shutil.rmtree(folder / "model.output_layer.weight"), r"has no tensor output_layer.weight"),
    ],
)
def test_zarr_that_is_not_whole_or_not_known(world, tmp_path, edit, message):
    archive = zarr_archive(tmp_path, weights(LLAMA_LIKE), edit=edit)
    with pytest.raises(UserError, match=message):
        convert.import_nemo(archive, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
