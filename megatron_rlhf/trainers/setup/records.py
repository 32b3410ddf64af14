"""Records are read and tokenised by one rank, once; all ranks read them from the disk, where they need them."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rlhf.config.data import RecordsConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.files.item_store import FORMAT, InMemory, ItemWriter, StoredItems, damaged, read_about, remember
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.monitoring.progress import Reading
from megatron_rlhf.parallel.collectives import first_message, on_first_rank
from megatron_rlhf.runs.session import Session

Item = TypeVar("Item")
Result = TypeVar("Result")


def load_once(
    what: str,
    source: str,
    data: RecordsConfig,
    tokenizer: Tokenizer,
    limits: Sequence[object],
    session: Session,
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
        Interrupted: the run was asked to stop meanwhile.
    """
    folder = session.folder / "cache" / f"{what}-{_identity(source, data, tokenizer, limits)}"
    path = Path(source).expanduser()

    def write() -> None:
        if read_about(folder) is not None and path.exists():
            return
        for left in folder.parent.glob(".*.writing"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        reading = Reading(f"{what} tokenised", path.stat().st_size if path.is_file() else None)

        def made() -> None:
            reading.made()
            session.interruption.leave_if_asked(f"{what} were tokenised")

        writer = ItemWriter(folder, kind, reading.read, made)
        try:
            writer.publish(load(writer).about())
        except OSError as error:
            raise UserError(f"{folder}: tokenised records cannot be written: {error.strerror}") from error
        finally:
            writer.discard()

    on_first_rank(write)
    about = read_about(folder)
    problem = None if about is not None else f"{folder} is not seen by rank {dist.get_rank()}: run.dir must be shared"
    if (first := first_message(problem)) is not None:
        raise UserError(first[1])
    assert about is not None
    try:
        return Examples(items=StoredItems(folder, kind), **about)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, str(error)) from error


def found_once(items: Sequence[Any], name: str, compute: Callable[[], Result]) -> Result:
    """As `collectives.on_first_rank`, but at a run's first start only where the items are on the disk: see `remember`."""
    return on_first_rank(lambda: remember(items, name, compute))


def watched(session: Session, items: Iterable[Item], what: str, done: str) -> Iterator[Item]:
    """The items one by one, on the first rank, with lines in the log (such as "prompts measured") where that takes long.

    Raises:
        Interrupted: the run was asked to stop meanwhile.
    """
    reading = Reading(f"{what} {done}", count=len(items) if isinstance(items, Sized) else None)
    for item in items:
        yield item
        reading.made()
        session.interruption.leave_if_asked(f"{what} were {done}")


def _identity(source: str, data: RecordsConfig, tokenizer: Tokenizer, limits: Sequence[object]) -> str:
    """Differs wherever the examples might. The part of them that is used is chosen later."""
    settings = {**dataclasses.asdict(data), "part": None, "part_shares": None, "source": source, "limits": list(limits)}
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
