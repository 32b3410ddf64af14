"""A disk that is full for a while loses no line of metrics."""

import logging
import resource
from pathlib import Path

import pytest

from megatron_rlhf.monitoring.files import StepFile, read_records


class FullDisk:
    """Takes `room` more bytes, then raises the system's error for a full disk."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()


def test_lines_wait_until_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    file = StepFile(path, enabled=True)
    file._file = disk = FullDisk(path.open("ab", buffering=0), room=60)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        for step in range(1, 301):  # more than any buffer holds
            file.append(step, [{"loss": step / 7, "text": "x" * 40}])
    assert caplog.records[0].getMessage() == f"step 1: {path}: No space left on device; kept until there is room"
    assert [row["step"] for row in read_records(path)] == [], "the first line is cut"
    disk.room = 10**6
    file.append(301, [{"loss": 0.0, "text": ""}])
    file.close()
    rows = list(read_records(path))
    assert [row["step"] for row in rows] == list(range(1, 302))
    assert rows[41]["loss"] == 42 / 7


def test_other_errors_are_raised(tmp_path: Path) -> None:
    file = StepFile(tmp_path / "metrics.jsonl", enabled=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.append(1, [{"loss": 1.0}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
