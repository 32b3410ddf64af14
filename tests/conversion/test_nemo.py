"""NeMo's archives, built here in each of their formats."""

import pickle
import tarfile

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.architecture import is_layer, tensor_shapes
from megatron_rlhf.conversion.hf.load import sharded_tensors
from megatron_rlhf.conversion.nemo import archive as nemo_archive
from megatron_rlhf.conversion.whole_tensors import Place, places

SHAPES = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
CONFIGS = {
    "gpt2": {
        "encoder_seq_length": 48,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "activation": "gelu",
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": True,
    },
    "llama": {
        "encoder_seq_length": 48,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": False,
    },
}


def weights(model):
    """Every tensor of a model, unsharded, by its place."""
    generator = torch.Generator().manual_seed(4)
    shapes = tensor_shapes(model, scalar=False)
    return {place: torch.randn(shapes[place.key], generator=generator) for place in places(shapes, model.num_layers)}


def pack(archive, config, files):
    """Write an archive: its configuration and files of weights by their path inside."""
    folder = archive.parent / "content"
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / name)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")
    return archive


def megatron_core_names(whole):
    return {f"model.{place}": tensor for place, tensor in whole.items()} | {"model.decoder._extra_state": None}


def megatron_lm_names(whole):
    """As NeMo stored GPT models before it used Megatron-Core."""
    old = {
        "embedding.word_embeddings": "embedding.word_embeddings",
        "embedding.position_embeddings": "embedding.position_embeddings",
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    renamed = {}
    for place, tensor in whole.items():
        name = str(place).replace("decoder.", "encoder.")
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[f"model.language_model.{name}"] = tensor
    return renamed


def split_over_ranks(whole, model, tensor, pipeline):
    """The files of a model saved at TP x PP, each rank's tensors under its own layer numbers."""
    rows = (
        "word_embeddings",
        "linear_qkv.weight",
        "linear_qkv.bias",
        "linear_fc1.weight",
        "linear_fc1.bias",
        "output_layer",
    )
    columns = ("linear_proj.weight", "linear_fc2.weight")
    per_stage = model.num_layers // pipeline
    files = {}
    for stage in range(pipeline):
        for rank in range(tensor):
            part = {}
            for place, value in whole.items():
                if place.layer is None:
                    last = place.key.startswith(("decoder.final", "output_layer"))
                    if stage != (pipeline - 1 if last else 0):
                        continue
                elif place.layer // per_stage != stage:
                    continue
                swiglu = "linear_fc1.weight" in place.key and model.activation is Activation.swiglu
                if swiglu:
                    value = torch.cat([half.chunk(tensor)[rank] for half in value.chunk(2)])
                elif any(name in place.key for name in rows):
                    value = value.chunk(tensor)[rank]
                elif any(name in place.key for name in columns):
                    value = value.chunk(tensor, 1)[rank]
                local = place.layer if place.layer is None else place.layer % per_stage
                part[f"model.{Place(place.key, local)}"] = value.clone()
            folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if pipeline > 1 else f"mp_rank_{rank:02d}"
            files[f"{folder}/model_weights.ckpt"] = part
    return files


FORMS = {
    "one_file": lambda whole, model: {"model_weights.ckpt": megatron_core_names(whole)},
    "before_megatron_core": lambda whole, model: {"model_weights.ckpt": megatron_lm_names(whole)},
    "tp2": lambda whole, model: split_over_ranks(whole, model, 2, 1),
    "tp2_pp2": lambda whole, model: split_over_ranks(whole, model, 2, 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_archive_becomes_a_policy(world, tmp_path, form, shape):
    model, whole = SHAPES[shape], weights(SHAPES[shape])
    archive = pack(tmp_path / "model.nemo", CONFIGS[shape], FORMS[form](whole, model))
    assert convert.import_nemo(archive, tmp_path / "ours") == len(whole)
    assert not list(tmp_path.glob(".nemo_*"))
    meta = sharded.read_meta(tmp_path / "ours")
    assert sharded.model_from_json(meta["roles"]["policy"]["model"]) == model
    expected, role = make_role(model, seed=1).frozen(), make_role(model, seed=2)
    for tensor in sharded_tensors(expected.modules, expected.layout):
        layer = tensor.global_offset[0] if is_layer(tensor.key) else None
        value = whole[Place(tensor.key, layer)]
        start = tensor.global_offset[tensor.prepend_axis_num]
        tensor.data.copy_(value[start : start + len(tensor.data)])
    sharded.load_weights(tmp_path / "ours", role, "policy")
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(role.logprobs(tokens, 2), expected.logprobs(tokens, 2))


def test_a_distributed_checkpoint_inside_an_archive(world, tmp_path):
    whole = weights(GPT2_LIKE)
    folder = tmp_path / "content" / "model_weights"
    folder.mkdir(parents=True)
    stacked = {
        f"model.{key}": torch.stack([whole[Place(key, i)] for i in range(4)])
        if is_layer(key)
        else whole[Place(key, None)]
        for key in tensor_shapes(GPT2_LIKE, scalar=False)
    }
    state = {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=0) for name, tensor in stacked.items()}
    dist_checkpointing.save(state, str(folder))
    archive = pack(tmp_path / "model.nemo", CONFIGS["gpt2"], {})
    assert convert.import_nemo(archive, tmp_path / "ours") == len(whole)


def test_gelu_is_the_approximation_where_nemo_fuses_it():
    def activation(**settings):
        return nemo_archive.read_shape({**CONFIGS["gpt2"], **settings}, 67, "test").activation

    assert activation() is Activation.gelu
    assert activation(bias_activation_fusion=False) is Activation.gelu_exact
    assert activation(bias_activation_fusion=False, openai_gelu=True) is Activation.gelu


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "layernorm1p"}, "normalization=layernorm1p is not supported, only layernorm or rmsnorm"),
        ({"activation": "squared-relu"}, "activation=squared-relu is not supported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type=alibi is not supported"),
        ({"transformer_block_type": "normformer"}, "transformer_block_type=normformer is not supported"),
        ({"num_moe_experts": 8}, "num_moe_experts=8 is not supported"),
        ({"ffn_hidden_size": 64}, "is [128, 32]; model_config.yaml calls for [64, 32]"),
    ],
)
def test_what_cannot_be_carried_is_refused(world, tmp_path, change, message):
    files = {"model_weights.ckpt": megatron_core_names(weights(GPT2_LIKE))}
    archive = pack(tmp_path / "model.nemo", {**CONFIGS["gpt2"], **change}, files)
    with pytest.raises(UserError) as caught:
        convert.import_nemo(archive, tmp_path / "ours")
    assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()
    assert not list(tmp_path.glob(".*"))


def test_archives_that_are_not_whole(world, tmp_path):
    whole = weights(GPT2_LIKE)
    files = split_over_ranks(whole, GPT2_LIKE, 2, 1)
    first = files["mp_rank_00/model_weights.ckpt"]

    def fails(message, files, name):
        archive = pack(tmp_path / name / "model.nemo", CONFIGS["gpt2"], files)
        with pytest.raises(UserError, match=message):
            convert.import_nemo(archive, tmp_path / "ours")

    fails("no weights of pipeline stage 0, tensor rank 0", {"mp_rank_01/model_weights.ckpt": first}, "rank")
    fails(
        "does not call for tensor model.more",
        {"model_weights.ckpt": megatron_core_names(whole) | {"model.more": torch.ones(1)}},
        "more",
    )
    fails("no weights known to us", {"else.ckpt": {}}, "nothing")
    less = {
        name: tensor
        for name, tensor in megatron_core_names(whole).items()
        if "layers.2.mlp.linear_fc2.bias" not in name
    }
    fails("no tensor decoder.layers.2.mlp.linear_fc2.bias", {"model_weights.ckpt": less}, "less")
    (tmp_path / "text.nemo").write_text("not an archive")
    with pytest.raises(UserError, match=r"text\.nemo: not a whole \.nemo archive"):
        convert.import_nemo(tmp_path / "text.nemo", tmp_path / "ours")


def test_a_disk_without_room_for_the_archive_is_not_the_archives_fault(world, tmp_path, monkeypatch):
    def no_room(*files):
        raise OSError(28, "No space left on device")

    archive = pack(tmp_path / "model.nemo", CONFIGS["gpt2"], {"else.ckpt": {}})
    monkeypatch.setattr(nemo_archive.shutil, "copyfileobj", no_room)
    with pytest.raises(UserError, match=r"model\.nemo: cannot be extracted into .*: .*No space left on device"):
        convert.import_nemo(archive, tmp_path / "ours")


def test_an_archive_writes_nothing_outside_itself(tmp_path):
    (tmp_path / "payload").write_text("x")
    with tarfile.open(tmp_path / "model.nemo", "w") as tar:
        tar.add(tmp_path / "payload", arcname="../../escaped")
    with pytest.raises(UserError, match=r"it holds \.\./\.\./escaped, a path outside of itself"):
        convert.import_nemo(tmp_path / "model.nemo", tmp_path / "ours")
    assert not (tmp_path / "escaped").exists()


class Malicious:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize("form", ["ranks", "distributed"])
def test_code_in_an_archive_is_never_run(world, tmp_path, capsys, form):
    files = {"model_weights.ckpt": {**megatron_core_names(weights(GPT2_LIKE)), "model.more": Malicious()}}
    if form == "distributed":
        (tmp_path / "content" / "model_weights").mkdir(parents=True)
        (tmp_path / "content" / "model_weights" / ".metadata").write_bytes(pickle.dumps(Malicious()))
        files = {}
    with pytest.raises(UserError, match=r"objects other than tensors|it names builtins.print"):
        convert.import_nemo(pack(tmp_path / "model.nemo", CONFIGS["gpt2"], files), tmp_path / "ours")
    assert "code was run" not in capsys.readouterr().out
