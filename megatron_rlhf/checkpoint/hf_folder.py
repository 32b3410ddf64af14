"""A Hugging Face folder on disk: config.json, and its tensors, read slice by slice."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rlhf.config.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is absent or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder: where each is, and its shape. No weight stays in memory between reads."""

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: Path) -> "TensorFiles":
        """Read the headers of all files; UserError for a missing, broken or contradictory one."""
        index = folder / f"{WEIGHTS}.index.json"
        if index.is_file():
            listed = read_json(index).get("weight_map", {})
            paths = sorted({folder / name for name in listed.values()})
        elif (folder / WEIGHTS).is_file():
            listed, paths = None, [folder / WEIGHTS]
        else:
            raise UserError(f"{folder}: no weights: neither {WEIGHTS} nor {index.name}{_pickled(folder)}")
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            for name, shape in _header(path).items():
                if name in files:
                    raise UserError(f"{path}: tensor {name} is also in {files[name].name}")
                files[name], shapes[name] = path, shape
        if listed is not None:
            _require_as_listed(index, listed, files)
        return cls(folder, files, shapes)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of a tensor: rows, and columns where it has two dimensions."""
        index = (rows, columns)[: len(self.shapes[name])]
        # Opened anew each time: a file kept open would keep the pages read from it in memory.
        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_slice(name)[index]


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise UserError(f"{path}: this file of the model is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}") from error


def _require_as_listed(index: Path, listed: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for name, file in listed.items():
        if name not in files or files[name].name != file:
            raise UserError(f"{index}: lists {name} in {file}, which does not hold it")
    for name in files:
        if name not in listed:
            raise UserError(f"{files[name]}: holds {name}, which {index.name} does not list")


def _pickled(folder: Path) -> str:
    return " (pytorch_model.bin is pickled: convert it with --allow-pickle)" if list(folder.glob("*.bin")) else ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and every value; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
