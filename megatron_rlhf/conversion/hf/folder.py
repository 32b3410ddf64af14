"""A Hugging Face folder on disk: config.json, and its tensors, read slice by slice."""

import functools
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlhf.config.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = "pytorch_model.bin"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is absent or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless digits, endless brackets
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder: where each is, its shape and type. No weight stays in memory between reads."""

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def open(cls, folder: Path, allow_pickle: bool = False) -> "TensorFiles":
        """Read the headers of all files; UserError for a missing, broken or contradictory one."""
        paths, index, listed = _find_files(folder, allow_pickle)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            for name, (shape, dtype) in _header(path).items():
                if name in files:
                    raise UserError(f"{path}: tensor {name} is also in {files[name].name}")
                files[name], shapes[name], dtypes[name] = path, shape, dtype
        if listed is not None:
            _require_as_listed(index, listed, files)
        return cls(folder, files, shapes, dtypes)

    @classmethod
    def of_file(cls, path: Path) -> "TensorFiles":
        """The tensors of one safetensors file."""
        header = _header(path)
        shapes = {name: shape for name, (shape, _) in header.items()}
        return cls(
            path.parent, dict.fromkeys(header, path), shapes, {name: dtype for name, (_, dtype) in header.items()}
        )

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of a tensor: rows, and columns where it has two dimensions."""
        part = (rows, columns)[: len(self.shapes[name])]
        if self.files[name].suffix != ".safetensors":
            return unpickle(self.files[name])[name][part].clone()
        # Opened each time: a file kept open would keep the pages read from it in memory.
        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_slice(name)[part]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; OSError when it cannot be written, for which safetensors has an error of its own."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


@functools.lru_cache(maxsize=1)
def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory: only tensors and plain containers are allowed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: this file of the model is missing") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds pickled objects other than tensors, which are never loaded") from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole file of pickled tensors: {str(error).splitlines()[0]}") from error


def _find_files(folder: Path, allow_pickle: bool) -> tuple[list[Path], Path, dict[str, str] | None]:
    """The files that hold weights, and the index with what it lists, if there is one."""
    for name in (WEIGHTS, PICKLED) if allow_pickle else (WEIGHTS,):
        index = folder / f"{name}.index.json"
        whole = (folder / name).is_file()
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{index}: weight_map must name the file of every tensor")
            if outside := next((file for file in listed.values() if Path(file).name != file), None):
                raise UserError(f"{index}: names {outside}, which is no file beside it")
            if not whole or name in listed.values():  # else a leftover: transformers, too, uses the whole file
                return sorted({folder / file for file in listed.values()}), index, listed
        if whole:
            return [folder / name], index, None
    pickled = any(folder.glob("*.bin"))
    hint = f"; {PICKLED} is pickled: convert it with --allow-pickle if you trust where it comes from" if pickled else ""
    raise UserError(f"{folder}: no weights: neither {WEIGHTS} nor {INDEX}{hint}")


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if path.suffix != ".safetensors":
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in unpickle(path).items()}
    if not path.is_file():
        raise UserError(f"{path}: this file of the model is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part[:0].dtype) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}") from error


def _require_as_listed(index: Path, listed: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for name, file in listed.items():
        if name not in files or files[name].name != file:
            raise UserError(f"{index}: lists {name} in {file}, which does not hold it")
    for name in files:
        if name not in listed:
            raise UserError(f"{files[name]}: holds {name}, which {index.name} does not list")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
