"""Adapters as folders of the `peft` library: adapter_config.json, adapter_model.safetensors, and a base model elsewhere.

peft adapts modules of transformers. Where one of them holds several of our projections (GPT-2's and GPT-NeoX's queries, keys
and values), they are written as one adapter of several times the rank, block by block: the same function, exactly.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import Adapter, projections
from megatron_rlhf.conversion.adapted import LAYERS, factor, factor_shapes, rows_of_projections
from megatron_rlhf.conversion.hf.folder import CONFIG, TensorFiles, write_tensors
from megatron_rlhf.conversion.hf.load import sharded_tensors
from megatron_rlhf.conversion.hf.weights import Described
from megatron_rlhf.conversion.peft_settings import SETTINGS, pattern_of_modules, read_settings
from megatron_rlhf.conversion.whole_tensors import Place, TensorSource
from megatron_rlhf.models.roles import Role

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Module:
    """Where a base model has one of our projections."""

    name: str
    rows: Tensor
    """Of the module's output."""
    index: int
    of: int
    """It is one of so many projections there."""


def is_peft_folder(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def modules(described: Described, adapter_parts: Mapping[str, Any], linear: str, layer: int) -> dict[str, Module]:
    """The module of each of a linear layer's adapted projections."""
    runs = described.runs(Place(f"{LAYERS}{linear}.weight", layer))
    run_of = torch.arange(len(runs)).repeat_interleave(torch.tensor([run.count for run in runs]))
    rows_of_file = torch.cat([torch.arange(run.start, run.start + run.count) for run in runs])
    rows = rows_of_projections(described.model, linear)
    homes = {part: runs[run_of[rows[part][0]]].name.removesuffix(".weight") for part in adapter_parts}
    found = {}
    for part, home in homes.items():
        together = [other for other in homes if homes[other] == home]
        found[part] = Module(home, rows_of_file[rows[part]], together.index(part), len(together))
    return found


@dataclass(frozen=True)
class PeftFolder:
    """An adapter on disk, in our terms."""

    folder: Path
    base: Path
    """Hugging Face folder of the model that it adapts."""
    described: Described
    adapter: Adapter
    factors: Mapping[tuple[int, str, str], tuple[Tensor, Tensor]]
    """(layer, linear layer, projection) -> A and B."""

    @classmethod
    def open(cls, folder: Path, key: str) -> "PeftFolder":
        """Read an adapter, and find its base; `key` names the folder in messages.

        Raises:
            UserError: for a base that is not there, and for an adapter that is not one of the same rank in every layer.
        """
        settings, where = read_settings(folder), folder / SETTINGS
        base = _find_base(folder, settings, key)
        described = Described.read(base)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: {WEIGHTS} is missing; pickled adapters are not read, save it as safetensors")
        stored = _Stored.of(folder, settings)
        factors: dict[tuple[int, str, str], tuple[Tensor, Tensor]] = {}
        scales: dict[tuple[int, str, str], float] = {}
        for layer in range(described.model.num_layers):
            for linear, parts in projections(described.model).items():
                for part, module in modules(described, parts, linear, layer).items():
                    if (read := stored.read(module, parts[part])) is not None:
                        factors[layer, linear, part], scales[layer, linear, part] = read
        stored.require_all_read()
        return cls(folder, base, described, _adapter(factors, scales, described.model.num_layers, where), factors)

    def load_into(self, role: Role) -> None:
        """Fill the role's adapters, at its layout."""
        with torch.no_grad():
            for tensor in sharded_tensors(role.modules, role.layout):
                if tensor.key in factor_shapes(self.described.model, self.adapter):
                    layer, (row, column) = tensor.global_offset[0], tensor.global_offset[1:]
                    linear, _, name = tensor.key.removeprefix(LAYERS).partition("_adapter.")
                    part, _, which = name.rpartition("_")
                    whole = self.factors[layer, linear, part]["ab".index(which)]
                    rows, columns = tensor.data.shape
                    tensor.data.copy_(whole[row : row + rows, column : column + columns])


def _find_base(folder: Path, settings: Mapping[str, Any], key: str) -> Path:
    name = settings.get("base_model_name_or_path") or ""
    for base in (Path(name), folder / name):
        if name and (base / CONFIG).is_file():
            return base
    raise UserError(
        f"{key}={folder}: the adapter's base model, base_model_name_or_path={name or 'null'} in {SETTINGS}, is not a Hugging "
        "Face folder here: put the folder's path there"
    )


@dataclass
class _Stored:
    """A folder's tensors, and which of them have been read."""

    folder: Path
    settings: Mapping[str, Any]
    files: TensorFiles
    unread: set[str]

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> "_Stored":
        files = TensorFiles.of_file(folder / WEIGHTS)
        return cls(folder, settings, files, set(files.shapes))

    def read(self, module: Module, shape: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], float] | None:
        """A, B and the scale of one projection; None where its module has no adapter."""
        names = [f"{_PREFIX}{module.name}.lora_{which}.weight" for which in "AB"]
        found = [name for name in names if name in self.files.shapes]
        if not found:
            return None
        if len(found) == 1:
            raise UserError(f"{self.folder / WEIGHTS}: {found[0]} has no counterpart {(set(names) - set(found)).pop()}")
        self.unread -= set(names)
        for name in names:
            if not self.files.dtypes[name].is_floating_point:
                raise UserError(f"{self.folder / WEIGHTS}: {name} holds {self.files.dtypes[name]}, and not fractions")
        (rank, columns), (rows, inner) = (self._matrix(name) for name in names)
        fits = rows >= int(module.rows.max()) + 1 if module.of > 1 else rows == shape[0]
        if columns != shape[1] or inner != rank or not fits:
            raise UserError(
                f"{self.folder / WEIGHTS}: the adapter of {module.name} is {[rank, columns]} and {[rows, inner]}; a projection "
                f"of {shape[1]} inputs and {shape[0]} outputs wants [rank, {shape[1]}] and [{shape[0]}, rank]"
            )
        a, b = (self.files.read(name) for name in names)
        scale = self._setting(module.name, "alpha_pattern", "lora_alpha") / (
            rank**0.5 if self.settings.get("use_rslora") else rank
        )
        own = _own_block(a, b, module, self.settings["r"])
        return own and (own, scale)

    def require_all_read(self) -> None:
        if self.unread:
            raise UserError(
                f"{self.folder / WEIGHTS}: {min(self.unread)} adapts nothing that has adapters here: those are the "
                "projections of attention and MLP"
            )

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self.files.shapes[name]
        if len(shape) != 2:
            raise UserError(f"{self.folder / WEIGHTS}: {name} is {list(shape)}, and not a matrix")
        return shape[0], shape[1]

    def _setting(self, module: str, pattern: str, default: str) -> float:
        listed = self.settings.get(pattern) or {}
        own = (value for name, value in listed.items() if re.match(pattern_of_modules(name), module))
        return float(next(own, self.settings[default]))


def _own_block(a: Tensor, b: Tensor, module: Module, rank: int) -> tuple[Tensor, Tensor] | None:
    """One projection's share of an adapter for several: its own block where there are blocks, else all of A.

    None: fewer blocks than projections, and none for this one.
    """
    b, blocks = b[module.rows], len(a) // rank
    if module.of == 1 or blocks == 1 or len(a) % rank:
        return a, b
    used = [i for i, block in enumerate(b.split(rank, dim=1)) if block.any()]
    if blocks < module.of and not used:
        return None
    if len(used) > 1:
        return a, b  # not blocks: a rank of its own, which is refused where ranks are compared
    own = used[0] if used else module.index
    return a.split(rank)[own], b.split(rank, dim=1)[own]


def _adapter(factors: Mapping, scales: Mapping, num_layers: int, where: Path) -> Adapter:
    """The one rank, scale and choice of projections that all layers must share."""
    if not factors:
        raise UserError(f"{where}: the folder holds no adapter of this base model")
    ranks = {len(a) for a, _ in factors.values()}
    if len(ranks) > 1 or len(set(scales.values())) > 1:
        raise UserError(f"{where}: modules have several ranks or scales (rank_pattern, alpha_pattern), not supported")
    parts = [part for layer, _, part in factors if layer == 0]
    for layer in range(num_layers):
        if [part for other, _, part in factors if other == layer] != parts:
            raise UserError(f"{where}: layer {layer} has adapters for other projections than layer 0, not supported")
    rank = ranks.pop()
    return Adapter(rank, next(iter(scales.values())) * rank, tuple(parts))


def write(folder: Path, described: Described, source: TensorSource, adapter: Adapter, base: str) -> None:
    """Write the adapters of a checkpoint as a folder for `peft`."""
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    ranks: dict[str, int] = {}
    for layer in range(described.model.num_layers):
        for name, several, a, b in _modules_of(described, source, adapter, layer):
            suffix = name.removeprefix(f"{described.architecture.layer_prefix}.{layer}.")
            targets.add(suffix)
            if several > 1:
                ranks[suffix] = several * adapter.rank
            tensors |= {f"{_PREFIX}{name}.lora_A.weight": a, f"{_PREFIX}{name}.lora_B.weight": b}
    write_tensors(folder / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    transposed = described.hf_tensor(f"{LAYERS}mlp.linear_fc2.weight").transposed
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "rank_pattern": ranks,
        "alpha_pattern": {name: adapter.scale * rank for name, rank in ranks.items()},
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _modules_of(
    described: Described, source: TensorSource, adapter: Adapter, layer: int
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """The adapted modules of a layer: name, number of projections in it, A and B."""
    for linear in projections(described.model):
        parts = adapter.parts(linear, described.model)
        by_name: dict[str, list[tuple[str, Module]]] = {}
        for part, module in modules(described, parts, linear, layer).items():
            by_name.setdefault(module.name, []).append((part, module))
        for name, held in by_name.items():
            pairs = [[source.read(Place(factor(linear, part, which), layer)) for which in "ab"] for part, _ in held]
            rows = _rows_of(described, f"{LAYERS}{linear}.weight", layer, name)
            b = pairs[0][1].new_zeros(rows, adapter.rank * len(held))
            for i, ((_, module), (_, own)) in enumerate(zip(held, pairs, strict=True)):
                b[module.rows, i * adapter.rank : (i + 1) * adapter.rank] = own
            yield name, len(held), torch.cat([a for a, _ in pairs]), b


def _rows_of(described: Described, key: str, layer: int, module: str) -> int:
    return sum(run.count for run in described.runs(Place(key, layer)) if run.name == f"{module}.weight")
