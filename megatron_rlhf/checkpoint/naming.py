"""Names of checkpoints in a run folder: `step_N`, `epoch_N`, `evaluation_N`, and the pointers `latest` and `best`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint.integrity import META, is_whole, sync
from megatron_rlhf.config.errors import UserError

FORMAT = 1
TOKENIZER = "tokenizer"
"""Folder inside a checkpoint with the tokenizer that its models were trained with."""
BEST = "best"
"""Points to the checkpoint that was chosen, which nothing deletes or replaces."""
# What a killed process may leave behind: folders being written or deleted. None of them counts as a checkpoint.
_WRITING, _LEAVING = "writing", "leaving"


_CANDIDATE = re.compile(r"(epoch_\d+(_step_\d+)?|evaluation_\d+)(_v\d+)?")


def aside(folder: Path) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return folder.with_name(f".{folder.name}.{_WRITING}")


def find_checkpoint(path: str | Path, key: str) -> Path:
    """The checkpoint folder that a user means: a step folder itself, or a run folder's best or else newest one.

    Raises:
        UserError: naming `key`, when the path holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{key}={path}: no such folder")
    if (path / META).is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = best(root) or latest(root)
    if newest is None:
        raise UserError(
            f"{key}={path} is neither a checkpoint ({META}), nor a run folder with checkpoints/, nor a Hugging Face "
            "folder (config.json)"
        )
    return newest


def best(root: Path) -> Path | None:
    """The checkpoint that was chosen from those of a run."""
    return _pointed(root, BEST)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`: the one `latest` names, or else the highest step."""
    whole = [step for step in steps(root) if is_whole(step)]
    return _pointed(root, "latest") or (whole[-1] if whole else None)


def newest_first(root: Path) -> list[Path]:
    """Every step under `root`, whole or not, in the order in which a run would try to continue from them."""
    first = _pointed(root, "latest")
    others = [step for step in reversed(steps(root)) if step != first]
    return others if first is None else [first, *others]


def steps(root: Path) -> list[Path]:
    """The folders `step_N`, by N."""
    found = [(int(m.group(1)), p) for p in root.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def candidates(root: Path) -> list[Path]:
    """The folders to choose from, such as `epoch_N`."""
    return sorted(path for path in root.glob("e*_*") if _CANDIDATE.fullmatch(path.name))


def point(root: Path, name: str, target: str) -> None:
    """Make `root/name` point to the checkpoint `target`: replaced atomically, never half-written. On one rank."""
    temporary = root / f".{name}.{_WRITING}"
    temporary.write_text(target)
    sync(temporary)
    temporary.replace(root / name)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder, replacing what had its name; `latest` points to it if it is a step. On one rank."""
    if folder.exists():
        remove(folder)
    temporary.rename(folder)
    sync(folder.parent)
    if folder.name.startswith("step_"):
        point(folder.parent, "latest", folder.name)


def delete_old(newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete steps before `newest`, except the last `keep_last` of all, multiples of `keep_every`, and the best.

    On one rank.
    """
    if keep_last <= 0 or not newest.name.startswith("step_"):
        return
    # Later steps, which can only be damaged ones, are not a reason to delete good ones.
    until = [step for step in steps(newest.parent) if _number(step) <= _number(newest)]
    chosen = best(newest.parent)
    for old in until[:-keep_last]:
        if old != chosen and (not keep_every or _number(old) % keep_every):
            remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint: it is renamed first, so that a process that is killed here does not leave half of one."""
    leaving = folder.with_name(f".{folder.name}.{_LEAVING}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what a killed process left behind. Only for the one job that owns the run folder; on one rank."""
    for ending in (_WRITING, _LEAVING):
        for left in root.glob(f".*.{ending}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint, checked for its format."""
    try:
        meta = json.loads((folder / META).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / META}:{error.lineno}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / META}: broken JSON: {error}") from error
    if not isinstance(meta, dict):
        raise UserError(f"{folder / META}: a JSON object is expected, found {type(meta).__name__}")
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder / META}: format {meta.get('format')}, this version reads format {FORMAT}")
    return meta


def _pointed(root: Path, name: str) -> Path | None:
    if not (root / name).is_file():
        return None
    target = (root / name).read_text(errors="replace").strip()
    is_name = target not in ("", ".", "..") and Path(target).name == target  # of a checkpoint beside it, not a path
    return root / target if is_name and is_whole(root / target) else None


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step_"))
