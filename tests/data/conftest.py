"""A small tokenizer, files on the spot, and the real data that lies beside the repository."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlhf.data.tokenizer import Tokenizer, train_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

WriteRecords = Callable[..., Path]


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there: real data is kept outside the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level with one merge, so that almost every character is one token."""
    return train_tokenizer(["aa"], 259, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write_records(tmp_path: Path) -> WriteRecords:
    """Writes records as JSON lines; the first record stands on line 1."""

    def write(*records: object, name: str = "records.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
