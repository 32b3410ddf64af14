"""The same records in files of several kinds, and what is said of a wrong one."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.records import read_records

ROWS = [{"prompt": "a\nb", "response": "é"}, {"prompt": "c", "response": "2020-01-01"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def message(source: object, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        list(read_records(str(source), columns))
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def gzipped(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(JSON_LINES.encode()))
    return folder / "a.jsonl.gz"


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> str:
    rows, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": other, "validation": rows}).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}#validation"


def dataset_folder(folder: Path) -> Path:
    (folder / "local").mkdir()
    write(folder / "local" / "train.jsonl", JSON_LINES.replace("2020-01-01", "text"))
    return folder / "local"
