"""A small tokenizer, and files of records written by the tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlhf.data.tokenizer import Tokenizer, train_tokenizer

WriteRecords = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level with one merge, so that almost every character is one token."""
    return train_tokenizer(["aa"], 259, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write_records(tmp_path: Path) -> WriteRecords:
    """Writes records as JSON lines; the first record is on line 1."""

    def write(*records: object, name: str = "records.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
