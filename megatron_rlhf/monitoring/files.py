"""Files that a crash cannot corrupt: replaced as a whole, or appended to one line at a time."""

import errno
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_rlhf.config.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that replaces it at the end of the block, but not if the block raises."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process ids are not unique over nodes
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, the whole file at once."""
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in `path`, one per line. A last line without its newline is incomplete, and left out."""
    return (record for _, record in _complete_lines(path))


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one JSON object a line, as a run writes in its run.dir")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}; expected one JSON object a line") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with the key 'step', a number; found {line[:80]!r}"
                )
            yield line, record


class StepFile:
    """A file of JSON lines in which each line belongs to a training step.

    Disabled, its methods do nothing, so that all ranks run the same code and one of them writes.
    """

    def __init__(self, path: Path, enabled: bool):
        self.path = path
        self.enabled = enabled
        self._file: IO[bytes] | None = None
        self._unwritten = b""
        """Lines that could not be written yet because of a full disk."""
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a line for each row, `step` first. JSON has no NaN or infinity: they become null, and are logged.

        A full disk is not a reason to stop: what could not be written is kept, and written with the next lines.
        """
        if not self.enabled:
            return
        for row in rows:
            plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
            bad = {
                name: value for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)
            }
            if bad:
                named = ", ".join(f"{name} = {value}" for name, value in bad.items())
                logger.warning("step %d: not finite, null in %s: %s", step, self.path.name, named)
            record = {"step": step, **plain, **dict.fromkeys(bad)}
            self._unwritten += json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("step %d: %s: %s; kept until there is room", step, self.path, error.strerror)

    def _write(self) -> None:
        self._file = self._file or self.path.open("ab", buffering=0)
        while self._unwritten:
            taken = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[taken or 0 :]

    def truncate(self, step: int) -> None:
        """Drop the lines of later steps, and an incomplete last one, before a run continues from `step`."""
        if not self.enabled:
            return
        self.close()
        if self.path.exists():
            with replacing(self.path) as shorter:
                shorter.writelines(line for line, record in _complete_lines(self.path) if record["step"] <= step)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._unwritten:
            self._write()
        if self._file is not None:
            self._file.close()
            self._file = None
