"""Tokenised items in a file that all ranks read where they need them: no rank holds them all.

`items.bin` holds one item after another, each as JSON with its arrays behind it; `items.idx` where each begins; `about.json`
what was dropped on the way; `facts.json` what was found out about all of them. Nothing that is read runs code.
"""

import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from megatron_rlhf.config.errors import UserError

Item = TypeVar("Item")

FORMAT = 2
"""Changes whenever the same records would be stored as something else."""
_HEAD = struct.Struct("<I")
BIN, IDX, ABOUT, FACTS = "items.bin", "items.idx", "about.json", "facts.json"


class Chosen(Sequence[Item]):
    """Some items of a sequence, in an order of their own, by their indices: nothing is copied."""

    def __init__(self, items: Sequence[Item], indices: Sequence[int] | npt.NDArray[np.integer]):
        self._items = items
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | Chosen[Item]":
        if isinstance(index, slice):
            return Chosen(self._items, self._indices[index])
        return self._items[int(self._indices[index])]

    def __iter__(self) -> Iterator[Item]:
        return (self._items[int(index)] for index in self._indices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


class Mapped(Sequence[Item]):
    """What a function makes of each item, when it is asked for."""

    def __init__(self, items: Any, function: Callable[[Any], Item]):
        self._items, self._function = items, function

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(self._items[index], self._function)
        return self._function(self._items[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._function, self._items)


def choose(items: Sequence[Item], indices: Sequence[int] | npt.NDArray[np.integer]) -> Sequence[Item]:
    """Some of the items: as a list where they are in memory."""
    return Chosen(items, indices) if isinstance(items, Chosen | StoredItems) else [items[int(i)] for i in indices]


def remember(items: Sequence[Any], name: str, compute: Callable[[], Any]) -> Any:
    """What `compute` finds out about all items, as JSON: found out once, and kept beside them where they are on the disk. On one
    rank; `name` says what it depends on besides the items.

    Raises:
        UserError: it cannot be written.
    """
    match items:
        case StoredItems():
            return items.remember(name, compute)
        case Chosen():
            return remember(items._items, f"{name} of {zlib.crc32(items._indices.tobytes()):08x}", compute)
        case Mapped():
            return remember(items._items, f"{name} of what is made of them", compute)
    return compute()


class StoredItems(Sequence[Item]):
    """Items of one dataclass, each made when it is asked for."""

    def __init__(self, folder: Path, kind: type[Item]):
        self._folder, self._kind = folder, kind
        self._ends = np.memmap(folder / IDX, dtype=np.int64, mode="r")
        self._bytes = np.memmap(folder / BIN, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Chosen[Item]:
        if isinstance(index, slice):
            return Chosen(self, range(len(self))[index])
        index = range(len(self))[index]
        content = self._bytes[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])].tobytes()
        try:
            return unpack(content, self._kind)
        except (ValueError, TypeError, AttributeError, LookupError, struct.error, RecursionError) as error:
            raise damaged(self._folder, f"item {index}: {error}") from error

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """As the function `remember`, which also takes a part of these items, or what is made of them."""
        known = _read_object(self._folder / FACTS) or {}
        if name not in known:
            known[name] = compute()
            aside = self._folder / f".{FACTS}.{secrets.token_hex(4)}"
            try:
                aside.write_text(json.dumps(known))
                os.replace(aside, self._folder / FACTS)
            except OSError as error:
                raise UserError(f"{self._folder / FACTS} cannot be written: {error.strerror}") from error
        return known[name]


class InMemory:
    """Where items go that are few enough."""

    progress: Callable[[int], object] | None = None
    """Called with the bytes that are read to make them, as in `read_records`."""

    def __call__(self, items: Iterable[Item]) -> Sequence[Item]:
        return list(items)

    def spill(self, kind: type[Any]) -> "InMemory":
        """For what is needed only until the items are made."""
        return self


IN_MEMORY = InMemory()


class ItemWriter(InMemory, Generic[Item]):
    """Writes a store one item at a time; the folder appears under its name only when it is whole. `made` is called with each
    item."""

    def __init__(
        self,
        folder: Path,
        kind: type[Item],
        progress: Callable[[int], object] | None = None,
        made: Callable[[], object] = lambda: None,
    ):
        self._folder, self._kind, self.progress, self._made = folder, kind, progress, made
        # Process ids repeat on other nodes.
        self._aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.writing")
        self._spilled: list[ItemWriter[Any]] = []

    def __call__(self, items: Iterable[Any]) -> Sequence[Any]:
        """Write all items; returns them as they are stored."""
        try:
            self._aside.mkdir(parents=True)
            end = 0
            with (self._aside / BIN).open("wb") as content, (self._aside / IDX).open("wb") as ends:
                for item in items:
                    end += content.write(pack(item))
                    ends.write(end.to_bytes(8, "little"))
                    self._made()
        except OSError as error:
            self.discard()
            raise UserError(f"{self._folder}: tokenised records cannot be written: {error.strerror}") from error
        except BaseException:
            self.discard()
            raise
        return StoredItems(self._aside, self._kind) if end else []

    def spill(self, kind: type[Any]) -> "ItemWriter[Any]":
        """On the disk too, until this store is published or discarded."""
        folder = self._folder.with_name(f"{self._folder.name}_spilled")
        self._spilled.append(ItemWriter(folder, kind, made=self._made))
        return self._spilled[-1]

    def publish(self, about: dict[str, Any]) -> None:
        """Give the store its name, with what describes it."""
        (self._aside / ABOUT).write_text(json.dumps(about))
        shutil.rmtree(self._folder, ignore_errors=True)
        os.rename(self._aside, self._folder)
        self.discard()

    def discard(self) -> None:
        """Delete what was written and has no name."""
        for spilled in self._spilled:
            spilled.discard()
        shutil.rmtree(self._aside, ignore_errors=True)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What describes a whole store; None where there is none."""
    return _read_object(folder / ABOUT)


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def damaged(folder: Path, problem: str) -> UserError:
    """What is said of a store that is not as it was written."""
    return UserError(f"{folder}: not the tokenised records that were written there ({problem}); delete the folder")


def pack(item: Any) -> bytes:
    """One dataclass object."""
    arrays: list[bytes] = []
    described = {field.name: _pack(getattr(item, field.name), arrays) for field in fields(item)}
    head = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b"".join([_HEAD.pack(len(head)), head, *arrays])


def unpack(content: bytes, kind: type[Item]) -> Item:
    """An object of `kind` from what `pack` made of it."""
    (length,) = _HEAD.unpack_from(content)
    start = _HEAD.size + length
    described = json.loads(content[_HEAD.size : start].decode("utf-8", "surrogatepass"))
    arrays = memoryview(content)[start:]
    return kind(**{name: _unpack(value, arrays) for name, value in described.items()})


def _pack(value: Any, arrays: list[bytes]) -> Any:
    """JSON as it is; everything else as an object with one key that says what it is."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_pack(each, arrays) for each in value]
        case tuple():
            return {"tuple": [_pack(each, arrays) for each in value]}
        case frozenset() | set():
            return {"set": [_pack(each, arrays) for each in sorted(value)]}
        case np.ndarray():
            place = sum(map(len, arrays))
            arrays.append(np.ascontiguousarray(value).tobytes())
            return {"array": [value.dtype.str, list(value.shape), place]}
        case dict():
            return {"dict": [[_pack(key, arrays), _pack(each, arrays)] for key, each in value.items()]}
    raise TypeError(f"a record holds {type(value).__name__} {value!r:.60}, which cannot be stored")


def _unpack(value: Any, arrays: memoryview) -> Any:
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    ((what, content),) = value.items()
    match what:
        case "tuple":
            return tuple(_unpack(each, arrays) for each in content)
        case "set":
            return frozenset(_unpack(each, arrays) for each in content)
        case "array":
            dtype, shape, place = np.dtype(content[0]), content[1], content[2]
            return np.frombuffer(arrays, dtype, int(np.prod(shape)), place).reshape(shape).copy()
    return {_unpack(key, arrays): _unpack(each, arrays) for key, each in content}


def _equal(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)
