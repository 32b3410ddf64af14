"""Every kind of file of a checkpoint (docs/security.md), with code planted in it: a UserError names the file, and the code does
not run."""

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run_example
from planting import Planted
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import naming, restricted, sharded
from megatron_rlhf.checkpoint.integrity import MANIFEST, digest, find_damage
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig, RunConfig
from megatron_rlhf.conversion.architecture import tensor_shapes
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.conversion.whole_tensors import CheckpointReader
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.runs.checkpoints import choose_checkpoint
from megatron_rlhf.trainers.step import TrainedRole


def seal(checkpoint: Path) -> None:
    """Matching checksums: whoever plants code can write them, too."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    lines = "".join(f"{digest(path)}  {path.relative_to(checkpoint)}\n" for path in files)
    (checkpoint / MANIFEST).write_text(lines)


def trained_role() -> TrainedRole:
    return TrainedRole.create(make_role(GPT2_LIKE), OptimizerConfig(lr=1e-3), Precision.fp32)


@pytest.fixture
def checkpoint(world, tmp_path) -> Path:
    trained = trained_role()
    trained.update(
        [Microbatch(torch.arange(8)[None], lambda logits: (logits.sum(), {"x": logits.sum().detach()}))], lr=1e-3
    )
    folder = tmp_path / "run" / "checkpoints" / "step_1"
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, SavedRole(trained.role, trained.optimizer))
        sharded.write_meta(aside, {"policy": trained.role}, {"step": 1})
    return folder


def plant_in_metadata(checkpoint: Path, trace: Path) -> None:
    (checkpoint / "policy" / ".metadata").write_bytes(pickle.dumps(Planted(trace)))


def plant_in_common(checkpoint: Path, trace: Path) -> None:
    torch.save({"optimizer": Planted(trace)}, checkpoint / "policy" / "common.pt")


def plant_in_objects(checkpoint: Path, trace: Path) -> None:
    """Replaces an object that lies between the tensors of a .distcp file."""
    metadata = restricted.load_metadata(checkpoint / "policy")
    places = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("random/")]
    content = io.BytesIO()
    torch.save([Planted(trace)], content)
    for place in places:
        path = checkpoint / "policy" / place.relative_path
        with path.open("r+b") as file:
            place.offset = file.seek(0, io.SEEK_END)
            place.length = file.write(content.getvalue())
    (checkpoint / "policy" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert places


READERS: dict[str, Callable[[Path], object]] = {
    "init_from": lambda folder: StartingPoint.find(str(folder), "k", POLICY).require_undamaged("k", False),
    "weights": lambda folder: sharded.load_weights(folder, make_role(GPT2_LIKE), "policy"),
    "role": lambda folder: load_role(folder),
    "resume": lambda folder: choose_checkpoint(folder.parent, RunConfig(dir="run", resume=True)),
    "convert": lambda folder: CheckpointReader(folder / "policy", tensor_shapes(GPT2_LIKE, False), 4).keys(),
}


def load_role(folder: Path) -> None:
    trained = trained_role()
    sharded.load_role(folder, SavedRole(trained.role, trained.optimizer))


@pytest.mark.parametrize(
    ("plant", "readers"),
    [
        (plant_in_metadata, ["init_from", "weights", "role", "resume", "convert"]),
        (plant_in_common, ["init_from", "weights", "role", "resume"]),
        (plant_in_objects, ["role"]),  # loading only weights reads no objects
    ],
)
def test_checkpoints(checkpoint, trace, plant, readers):
    plant(checkpoint, trace)
    seal(checkpoint)
    assert find_damage(checkpoint) is None
    for reader in readers:
        with pytest.raises(UserError, match=r"mkdir"):
            READERS[reader](checkpoint)


def test_metadata_names_no_file_outside_of_the_checkpoint(checkpoint):
    metadata = restricted.load_metadata(checkpoint / "policy")
    next(iter(metadata.storage_data.values())).relative_path = "../../../elsewhere"
    (checkpoint / "policy" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="a file outside of the checkpoint"):
        restricted.load_metadata(checkpoint / "policy")


def test_pointers_and_checksums_name_nothing_outside_of_their_folder(checkpoint):
    shutil.copytree(checkpoint, checkpoint.parents[2] / "elsewhere" / "step_9")
    for name in ("../../elsewhere/step_9", str(checkpoint.parents[2] / "elsewhere" / "step_9")):
        (checkpoint.parent / "latest").write_text(name)
        assert naming.latest(checkpoint.parent) == checkpoint
        manifest = checkpoint / MANIFEST
        manifest.write_text(manifest.read_text() + f"{'0' * 64}  {name}\n")
        assert "is broken" in str(find_damage(checkpoint))
        seal(checkpoint)


@pytest.mark.parametrize("form", ["bytes", "tensor", "torch"])
def test_scales_of_layers_in_fp8(trace, form):
    """Transformer Engine unpickles them when a module loads its state."""
    plain = {"scale": torch.ones(2), "history": [1.0], "steps": 3}

    def packed(value: object) -> object:
        content = io.BytesIO()
        if form == "torch":
            torch.save(value, content)
            return content
        pickled = pickle.dumps(value)
        return io.BytesIO(pickled) if form == "bytes" else torch.frombuffer(bytearray(pickled), dtype=torch.uint8)

    restricted.require_plain_scales({"layer.weight": torch.ones(1), "layer._extra_state": packed(plain)}, "step_1")
    for nested in (Planted(trace), {**plain, "more": [Planted(trace)]}):
        with pytest.raises(UserError, match=r"step_1: layer\._extra_state is more than the scales .*mkdir"):
            restricted.require_plain_scales({"layer._extra_state": packed(nested)}, "step_1")


class Fetched:
    """The way Python before 3.11.4 pickles members of enumerations."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self):
        return (getattr, self.arguments)


def test_metadata_may_fetch_members_of_enumerations_alone():
    from torch.distributed.checkpoint.planner import WriteItemType

    def read(value: object) -> object:
        return restricted.MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()

    assert read(Fetched(WriteItemType, "TENSOR")) is WriteItemType.TENSOR
    for owner, name in ((torch.Size, "__new__"), (WriteItemType, "__call__"), (WriteItemType, "mro")):
        with pytest.raises(pickle.UnpicklingError, match=f"it asks for {name}"):
            read(Fetched(owner, name))


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_ends_with_the_message(recipe, tmp_path, trace, resumes):
    run = tmp_path / "copy"
    shutil.copytree(recipe.root / "sft", run)
    step = naming.latest(run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / (run / "checkpoints" / "best").read_text())
    plant_in_metadata(step, trace)
    seal(step)
    how = ["sft.epochs=11", "run.resume=true"] if resumes else [f"policy.init_from={run}"]
    arguments = recipe.sft(str(run if resumes else tmp_path / "run"), *how)
    finished = run_example("train_sft", *arguments)
    assert finished.codes == [2], finished.output
    assert f"{step}/policy/.metadata: not the metadata of a distributed checkpoint: it names" in finished.output
    assert "Traceback" not in finished.output


def test_config_of_the_run_that_a_checkpoint_is_from(checkpoint, trace):
    (checkpoint.parents[1] / "config.yaml").write_text(f'data: !!python/object/apply:os.mkdir ["{trace}"]\n')
    with pytest.raises(UserError, match=r"config\.yaml: not plain YAML"):
        ExtraFiles.find(checkpoint, None)
