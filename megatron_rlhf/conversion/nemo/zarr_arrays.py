"""Tensors of a distributed checkpoint in zarr format, as Megatron-Core wrote them before torch's format.

Its current version cannot read them. It wrote each tensor as a folder of uncompressed chunks (zarr version 2: raw
numbers in files named by their place in the grid, `.zarray` to describe them), so no library is needed to read it.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.hf.folder import read_json
from megatron_rlhf.conversion.whole_tensors import EVERY_ROW, Place

DESCRIPTION = ".zarray"
_DTYPES = {"bfloat16": torch.bfloat16, "<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}
_ONLY: dict[str, tuple[Any, ...]] = {
    "zarr_format": (2,),
    "compressor": (None,),
    "filters": (None, []),
    "order": ("C",),
    "dimension_separator": (".", None),
}


@dataclass(frozen=True)
class ZarrArray:
    """One tensor: a grid of chunks, each in a file of its own."""

    folder: Path

    @cached_property
    def _description(self) -> dict[str, Any]:
        path = self.folder / DESCRIPTION
        content = read_json(path)
        for key, allowed in (_ONLY | {"dtype": tuple(_DTYPES)}).items():
            if content.get(key, allowed[0]) not in allowed:
                raise UserError(f"{path}: {key}={content[key]} is not supported, only {' or '.join(map(str, allowed))}")
        return content

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._description["shape"])

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self._description["dtype"]]

    def read(self, wanted: tuple[slice, ...]) -> Tensor:
        """A block of the tensor; a slice with start and stop for each axis."""
        result = torch.empty([part.stop - part.start for part in wanted], dtype=self.dtype)
        sizes = self._description["chunks"]
        touched = [range(part.start // n, -(-part.stop // n)) for part, n in zip(wanted, sizes, strict=True)]
        for place in itertools.product(*touched):
            source, target = [], []
            for i, n, part in zip(place, sizes, wanted, strict=True):
                first, last = max(i * n, part.start), min((i + 1) * n, part.stop)
                source.append(slice(first - i * n, last - i * n))
                target.append(slice(first - part.start, last - part.start))
            result[tuple(target)] = self._chunk(place)[tuple(source)]
        return result

    def _chunk(self, place: tuple[int, ...]) -> Tensor:
        # A chunk at the edge is stored at full size, like the others.
        path, sizes = self.folder / ".".join(map(str, place)), self._description["chunks"]
        count = math.prod(sizes)
        found = path.stat().st_size if path.is_file() else 0
        if found != count * self.dtype.itemsize:
            raise UserError(f"{path}: not a whole chunk: {found} bytes instead of {count * self.dtype.itemsize}")
        return torch.from_file(str(path), size=count, dtype=self.dtype).reshape(sizes)


@dataclass(frozen=True)
class ZarrReader:
    """Reads whole tensors of a checkpoint, or some rows of them."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    num_layers: int
    prefix: str

    def keys(self) -> list[str]:
        """Every stored tensor, by our name where it has one."""
        return sorted(path.parent.name.removeprefix(self.prefix) for path in self.folder.glob(f"*/{DESCRIPTION}"))

    def dtype(self, key: str) -> torch.dtype:
        """Type of the stored tensor."""
        return self._array(key).dtype

    def stored_rows(self, key: str) -> int:
        """Rows of a stored tensor outside the layers, including padding."""
        return self._array(key).shape[0]

    def read(self, place: Place, rows: slice = EVERY_ROW) -> Tensor:
        """One tensor, or some rows of it."""
        array, shape = self._array(place.key), self.shapes[place.key]
        stacked = shape if place.layer is None else (self.num_layers, *shape)
        if array.shape != stacked:
            raise UserError(f"{array.folder}: is {list(array.shape)}; the model's shape wants {list(stacked)}")
        start, stop, _ = rows.indices(shape[0])
        part = (slice(start, stop), *(slice(0, n) for n in shape[1:]))
        return array.read(part) if place.layer is None else array.read((slice(place.layer, place.layer + 1), *part))[0]

    def _array(self, key: str) -> ZarrArray:
        folder = self.folder / f"{self.prefix}{key}"
        if not folder.is_dir():
            raise UserError(f"{self.folder}: the checkpoint has no tensor {key}")
        return ZarrArray(folder)
