"""Conversions as the tests make them: import, export, and one of our checkpoints made without any."""

import torch
from safetensors.torch import load_file
from toys import make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf import export as hf_export
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles

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
    extra = ExtraFiles.find(checkpoint, like)
    return convert.export_huggingface(checkpoint, output, role, architecture, dtype, extra, CHECK, shard_bytes)


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
