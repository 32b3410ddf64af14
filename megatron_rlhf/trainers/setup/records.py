"""Records are read and tokenised by one rank, once; all ranks read them from the disk, where they need them."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rlhf.config.data import RecordsConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.files.item_store import FORMAT, InMemory, ItemWriter, StoredItems, damaged, read_about
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.monitoring.progress import Reading
from megatron_rlhf.parallel.collectives import first_message

Item = TypeVar("Item")
Result = TypeVar("Result")


def load_once(
    what: str,
    source: str,
    data: RecordsConfig,
    tokenizer: Tokenizer,
    limits: Sequence[object],
    run_dir: str,
    kind: type[Item],
    load: Callable[[InMemory], Examples[Item]],
) -> Examples[Item]:
    """The examples that `load` makes of `source`. They stay in the run's folder, for when it is resumed. Collective.

    Args:
        what: Name of the store.
        data: The settings that decide, with `tokenizer` and `limits`, what the examples are.
        kind: Their class.
        load: Reads the records; what it is given takes the examples one by one.

    Raises:
        UserError: what `load` raises, on all ranks.
    """
    folder = Path(run_dir) / "cache" / f"{what}-{_identity(source, data, tokenizer, limits)}"
    problem = None
    if dist.get_rank() == 0 and (read_about(folder) is None or not Path(source).expanduser().exists()):
        for left in folder.parent.glob(".*.writing"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        path = Path(source).expanduser()
        reading = Reading(f"{what} tokenised", path.stat().st_size if path.is_file() else None)
        writer = ItemWriter(folder, kind, reading.read, reading.made)
        try:
            writer.publish(load(writer).about())
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder}: tokenised records cannot be written: {error.strerror}"
        finally:
            writer.discard()
    if (first := first_message(problem)) is not None:
        raise UserError(first[1])
    about = read_about(folder)
    problem = None if about is not None else f"{folder} is not seen by rank {dist.get_rank()}: run.dir must be shared"
    if (first := first_message(problem)) is not None:
        raise UserError(first[1])
    assert about is not None
    try:
        return Examples(items=StoredItems(folder, kind), **about)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, str(error)) from error


def on_first_rank(compute: Callable[[], Result]) -> Result:
    """What one rank finds out about all records, on all ranks, or the UserError that it raises. Collective over the world."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def found_once(items: Sequence[Any], name: str, compute: Callable[[], Result]) -> Result:
    """As `on_first_rank`, but at a run's first start only, where the items are all those of a store on the disk, which keeps the
    result: a JSON value, under a name that says what it depends on besides the items. Collective over the world."""
    if isinstance(items, StoredItems):
        return on_first_rank(lambda: items.remember(name, compute))
    return on_first_rank(compute)


def watched(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items one by one, with lines in the log where that takes long."""
    reading = Reading(what, count=len(items))
    for item in items:
        yield item
        reading.made()


def _identity(source: str, data: RecordsConfig, tokenizer: Tokenizer, limits: Sequence[object]) -> str:
    """Differs wherever the examples might."""
    settings = {**dataclasses.asdict(data), "source": source, "limits": list(limits)}
    files = [_stamp(Path(source)), _stamp(Path(str(getattr(data, "format", None))))]
    decides = [FORMAT, settings, files, tokenizer.fingerprint, str(tokenizer.hf.chat_template)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of a file, or of those in a folder."""
    path = path.expanduser()
    files = (
        [path]
        if path.is_file()
        else sorted(each for each in path.rglob("*") if each.is_file())
        if path.is_dir()
        else []
    )
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
