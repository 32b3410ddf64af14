"""Checksums of a checkpoint: written last, so a folder without them is not one; verified before it is trusted.

The file is what `sha256sum` writes: `cd step_100 && sha256sum --check checksums.sha256` works without this package.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhf.config.errors import RunFailed
from megatron_rlhf.parallel import collectives

META = "meta.json"
"""Describes the checkpoint; the folders beside it are the roles."""
MANIFEST = "checksums.sha256"
_CHUNK = 1 << 22


class NotWritten(RunFailed, OSError):
    """A checkpoint could not be written (a full disk, most likely). Raised on all ranks when it happened on one."""


def agree(error: Exception | None) -> None:
    """Raise NotWritten on every rank if any rank brings an error. Collective.

    Without it the rank with the full disk would leave, and the others would wait for it forever.
    """
    failure = collectives.first_message(None if error is None else _reason(error))
    if failure is not None:
        rank, text = failure
        raise NotWritten(f"{text} (rank {rank})" if dist.get_world_size() > 1 else text) from error


def _reason(error: Exception) -> str:
    """What the system said, where torch has made "unexpected pos 704 vs 598" of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error) or repr(cause or error)


def is_whole(folder: Path) -> bool:
    """The checkpoint has everything that is written last; `find_damage` says whether its bytes are right."""
    return (folder / META).is_file() and (folder / MANIFEST).is_file()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write the checksums of all files and sync what is not on the disk yet. Collective; raises NotWritten on all ranks.

    Args:
        known: digests that this rank already has, by path inside the folder: those of the files it wrote.
    """
    digests = _merged(known)
    rest: list[Any] = [sorted(set(_files(folder)) - set(digests)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(rest)
    error: OSError | None = None
    mine: dict[str, str] = {}
    try:
        for name in rest[0][dist.get_rank() :: dist.get_world_size()]:
            sync(folder / name)
            mine[name] = digest(folder / name)
    except OSError as problem:
        error = problem
    agree(error)
    digests |= _merged(mine)
    if dist.get_rank() == 0:
        try:
            (folder / MANIFEST).write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
            sync_tree(folder)
        except OSError as problem:
            error = problem
    agree(error)


def digest_of(folder: Path, role: str) -> str:
    """A name for the weights of a role, made from the checksums of its files: identical bytes have the same name."""
    lines = (folder / MANIFEST).read_text(errors="replace").splitlines()
    files = sorted(
        line for line in lines if f"  {role}/" in line and not line.endswith("/.metadata")
    )  # has a random part
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]


def find_damage(folder: Path, role: str | None = None) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written. Collective.

    Each rank reads its share of the files, so that a checkpoint of terabytes is read by all nodes at once.

    Args:
        role: look only at this role's files and the description.
    """
    plan: list[Any] = [None]
    if dist.get_rank() == 0:
        plan = [_read_manifest(folder)]
    dist.broadcast_object_list(plan)
    if isinstance(plan[0], str):
        return plan[0]
    entries = [(name, value) for name, value in plan[0] if role is None or name == META or name.startswith(f"{role}/")]
    mine = entries[dist.get_rank() :: dist.get_world_size()]
    problem = collectives.first_message(_first_damage(folder, mine))
    return None if problem is None else problem[1]


def sync(path: Path) -> None:
    """Sync to the disk: a file's content, or a folder's entries, are there when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same for a folder with everything in it."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _merged(part: Mapping[str, str]) -> dict[str, str]:
    """The union of what all ranks know, on the first one."""
    return {name: value for each in collectives.gather_on_first_rank(dict(part)) for name, value in each.items()}


def _read_manifest(folder: Path) -> list[tuple[str, str]] | str:
    """Pairs of name and digest, or what is wrong."""
    for name in (META, MANIFEST):
        if not (folder / name).is_file():
            return f"{name} is missing: it was not written to its end, or files were deleted"
    entries = []
    for number, line in enumerate((folder / MANIFEST).read_text(errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None or Path(match.group(2)).is_absolute() or ".." in Path(match.group(2)).parts:
            return f"{MANIFEST}, line {number} is broken: {line[:80]!r}"
        entries.append((match.group(2), match.group(1)))
    if META not in dict(entries):
        return f"{MANIFEST} is cut off"
    try:
        roles = json.loads((folder / META).read_text())["roles"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{META} is broken"
    for role in roles:  # a file cut off at a line's end would hide files that nobody then misses
        if not any(name.startswith(f"{role}/") for name, _ in entries):
            return f"{MANIFEST} is cut off: it has no files of {role}"
    return entries


def _first_damage(folder: Path, entries: Sequence[tuple[str, str]]) -> str | None:
    for name, expected in entries:
        path = folder / name
        try:
            if digest(path) != expected:
                return f"{name} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
