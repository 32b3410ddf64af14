"""GPT checkpoints of NeMo (`.nemo` archives) as a source of our tensors.

Their tensors are Megatron's, so only the names differ: those of Megatron-Core inside NeMo, or of Megatron-LM before it.
What is split over tensor and pipeline ranks in the archive is joined here, one tensor at a time.

NeMo is not used, even where its extra is installed: its reader builds the model that saved the archive, whose class
later versions dropped, needs memory for all of it, and unpickles whatever is inside. NeMo helps with what is refused
here: open such an archive with the NeMo that wrote it and save it again.
"""

import dataclasses
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Activation, ModelConfig
from megatron_rlhf.conversion import architecture as megatron
from megatron_rlhf.conversion.architecture import (
    FC1,
    FC2,
    HEAD,
    PROJECTION,
    QKV,
    WORD_EMBEDDINGS,
    is_layer,
    tensor_shapes,
)
from megatron_rlhf.conversion.hf.folder import unpickle
from megatron_rlhf.conversion.nemo.shape import read_shape
from megatron_rlhf.conversion.nemo.zarr_arrays import DESCRIPTION, ZarrReader
from megatron_rlhf.conversion.whole_tensors import EVERY_ROW, CheckpointReader, Place, TensorSource

CONFIG = "model_config.yaml"
_WEIGHTS = "model_weights.ckpt"
_DISTRIBUTED = "model_weights"

# Axis along which tensor-parallel ranks split a tensor; norms and biases of row-parallel matrices are whole on each.
_SPLIT = {
    WORD_EMBEDDINGS: 0,
    HEAD: 0,
    f"{QKV}.weight": 0,
    f"{QKV}.bias": 0,
    f"{FC1}.weight": 0,
    f"{FC1}.bias": 0,
    f"{PROJECTION}.weight": 1,
    f"{FC2}.weight": 1,
}
# Names of Megatron-LM, as NeMo had them before Megatron-Core. `{}` stands for the layer.
_OLD_LAYER = "language_model.encoder.layers.{}."
_OLD_NAMES = {
    WORD_EMBEDDINGS: "language_model.embedding.word_embeddings.weight",
    megatron.POSITION_EMBEDDINGS: "language_model.embedding.position_embeddings.weight",
    HEAD: "language_model.output_layer.weight",
    f"{megatron.FINAL_NORM}.": "language_model.encoder.final_layernorm.",
    f"{QKV}.layer_norm_": _OLD_LAYER + "input_layernorm.",
    f"{FC1}.layer_norm_": _OLD_LAYER + "post_attention_layernorm.",
    f"{QKV}.": _OLD_LAYER + "self_attention.query_key_value.",
    f"{PROJECTION}.": _OLD_LAYER + "self_attention.dense.",
    f"{FC1}.": _OLD_LAYER + "mlp.dense_h_to_4h.",
    f"{FC2}.": _OLD_LAYER + "mlp.dense_4h_to_h.",
}
# Megatron-Core without Transformer Engine keeps a norm separate from the matrix after it.
_LOCAL_NAMES = {
    f"{QKV}.layer_norm_": "decoder.layers.{}.input_layernorm.",
    f"{FC1}.layer_norm_": "decoder.layers.{}.pre_mlp_layernorm.",
}
_UNUSED = re.compile(r".*(_extra_state|inv_freq|core_attention\..*)")


@dataclass(frozen=True)
class NemoWeights:
    """Our tensors, read from an extracted archive."""

    folder: Path
    model: ModelConfig
    ranks: tuple[tuple[Path, ...], ...]
    """Files of weights, [pipeline stage][tensor-parallel rank]."""
    _last: dict[Place, Tensor] = field(default_factory=dict)
    """The last tensor read, kept because its rows are requested piece by piece."""

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.model, scalar=False)

    def dtype(self, key: str) -> torch.dtype:
        return self._parts(Place(key, 0 if is_layer(key) else None))[0].dtype

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        if place not in self._last:
            self._last.clear()
            self._last[place] = self._whole(place)
        return self._last[place][rows].clone()

    def _whole(self, place: Place) -> Tensor:
        axis, parts = _SPLIT.get(place.key), self._parts(place)
        if axis is None or len(parts) == 1:
            whole = parts[0]
        elif place.key.startswith(f"{FC1}.") and self.model.activation is Activation.swiglu:
            halves = [part.chunk(2) for part in parts]  # of each rank: its gate, its up
            whole = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        else:
            whole = torch.cat(parts, axis)
        shape = self.shapes[place.key]
        if tuple(whole.shape) != shape:
            raise UserError(f"{self.folder}: {place} is {list(whole.shape)}; {CONFIG} calls for {list(shape)}")
        return whole

    def _parts(self, place: Place) -> list[Tensor]:
        per_stage = self.num_layers // len(self.ranks)
        if place.layer is None:
            last = place.key == HEAD or place.key.startswith(megatron.FINAL_NORM)
            stage, layer = (len(self.ranks) - 1 if last else 0), None
        else:
            stage, layer = place.layer // per_stage, place.layer % per_stage
        return [_find(unpickle(path), Place(place.key, layer), path) for path in self.ranks[stage]]

    def require_no_other_tensors(self) -> None:
        """Raise UserError for a tensor that a model of this shape does not have."""
        per_stage = self.num_layers // len(self.ranks)
        known = {
            name
            for key in self.shapes
            for layer in (range(per_stage) if is_layer(key) else [None])
            for name in _names(Place(key, layer))
        }
        # The last stage has its own copy of tied embeddings.
        known |= set(_names(Place(HEAD, None))) | {"word_embeddings.weight"} if self.model.tied_embeddings else set()
        for path in (path for stage in self.ranks for path in stage):
            for name in unpickle(path):
                if name.removeprefix("model.") not in known and not _UNUSED.fullmatch(name):
                    raise UserError(f"{path.relative_to(self.folder)}: {CONFIG} does not call for tensor {name}")


def _names(place: Place) -> list[str]:
    """Names of a tensor: in Megatron-Core, in its local layers, in Megatron-LM."""
    names = [str(place)]
    for table in (_LOCAL_NAMES, _OLD_NAMES):
        start = next((start for start in table if place.key.startswith(start)), None)
        if start is not None:
            names.append(table[start].format(place.layer) + place.key.removeprefix(start))
    return names


def _find(tensors: Mapping[str, Tensor], place: Place, path: Path) -> Tensor:
    names = [prefix + name for prefix in ("model.", "") for name in _names(place)]
    found = next((name for name in names if name in tensors), None)
    if found is None:
        raise UserError(
            f"{path.name}: no tensor {place} under any of its names ({', '.join(names[: len(names) // 2])})"
        )
    return tensors[found]


@contextmanager
def opened(archive: Path, aside: Path) -> Iterator[tuple[ModelConfig, TensorSource]]:
    """Shape and tensors of an archive, which is extracted into a folder inside `aside` while it is read.

    Raises:
        UserError: for a file that is not a `.nemo` archive of a GPT, or one that cannot be converted.
    """
    with TemporaryDirectory(prefix=".nemo_", dir=aside) as temporary:
        folder = Path(temporary)
        try:
            with tarfile.open(archive) as tar:
                _extract(tar, folder)
        except FileNotFoundError:
            raise UserError(f"--nemo {archive}: no such file") from None
        except (tarfile.TarError, EOFError, OSError) as error:
            system = isinstance(error, OSError) and error.errno is not None  # a full disk, say
            what = f"cannot be extracted into {aside}" if system else "not a whole .nemo archive"
            raise UserError(f"--nemo {archive}: {what}: {error}") from error
        if not (folder / CONFIG).is_file():
            raise UserError(f"--nemo {archive}: holds no {CONFIG}; it is not a model that NeMo saved")
        yield _open(folder, _read_config(folder / CONFIG, archive), archive)


def _read_config(path: Path, archive: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--nemo {archive}: {CONFIG} is not plain YAML: {reason}") from error
    if not isinstance(config, Mapping):
        raise UserError(f"--nemo {archive}: {CONFIG} holds {type(config).__name__}, not keys and values")
    return config


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    # Only files, and none outside the folder; tarfile's own filters came with Python 3.11.4.
    for member in tar:
        target = (folder / member.name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise tarfile.ExtractError(f"it holds {member.name}, a path outside of itself")
        content = tar.extractfile(member) if member.isreg() else None
        if content is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)


def _open(folder: Path, config: Mapping[str, Any], archive: Path) -> tuple[ModelConfig, TensorSource]:
    where = f"--nemo {archive}: {CONFIG}"
    reader: CheckpointReader | ZarrReader | None = None
    if (folder / _DISTRIBUTED / ".metadata").is_file():
        reader = CheckpointReader(folder / _DISTRIBUTED, {}, config.get("num_layers", 0), prefix="model.")
    elif any((folder / _DISTRIBUTED).glob(f"*/{DESCRIPTION}")):
        reader = ZarrReader(folder / _DISTRIBUTED, {}, config.get("num_layers", 0), prefix="model.")
    if reader is not None:
        model = read_shape(config, reader.stored_rows(WORD_EMBEDDINGS), where)
        shapes = tensor_shapes(model, scalar=False)
        for name in reader.keys():  # noqa: SIM118
            if name not in shapes and not _UNUSED.fullmatch(name) and not name.startswith("optimizer."):
                raise UserError(f"--nemo {archive}: {CONFIG} does not call for tensor {name}")
        return model, dataclasses.replace(reader, shapes=shapes)
    ranks = _ranks(folder, archive)
    embeddings = [_find(unpickle(path), Place(WORD_EMBEDDINGS, None), path) for path in ranks[0]]
    model = read_shape(config, sum(map(len, embeddings)), where)
    if model.num_layers % len(ranks):
        raise UserError(f"{where}: {model.num_layers} layers do not divide into the archive's {len(ranks)} stages")
    weights = NemoWeights(folder, model, ranks)
    weights.require_no_other_tensors()
    return model, weights


def _ranks(folder: Path, archive: Path) -> tuple[tuple[Path, ...], ...]:
    if (folder / _WEIGHTS).is_file():
        return ((folder / _WEIGHTS,),)
    found: dict[tuple[int, int], Path] = {}
    for path in folder.glob(f"*/{_WEIGHTS}"):
        match = re.fullmatch(r"(?:mp|tp)_rank_(\d+)(?:_pp_rank_(\d+))?", path.parent.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = path
    if not found:
        raise UserError(
            f"--nemo {archive}: holds no weights known to us; needed is {_WEIGHTS}, one or one a rank, or a folder "
            f"{_DISTRIBUTED} in Megatron-Core's torch_dist or zarr format. NeMo opens others: save it again there"
        )
    stages, size = max(stage for stage, _ in found) + 1, max(rank for _, rank in found) + 1
    missing = [(p, t) for p in range(stages) for t in range(size) if (p, t) not in found]
    if missing:
        raise UserError(f"--nemo {archive}: no weights of pipeline stage {missing[0][0]}, tensor rank {missing[0][1]}")
    return tuple(tuple(found[stage, rank] for rank in range(size)) for stage in range(stages))
