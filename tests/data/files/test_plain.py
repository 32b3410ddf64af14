"""Values of records become JSON, wherever they are stored."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_rlhf.data.files.plain import plain
from megatron_rlhf.data.records import read_records


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, None, True, "é \U0001f600"]}, {"a": [1, 2.5, None, True, "é \U0001f600"]}),
        ([float("nan"), {"x": float("-inf")}], [None, {"x": None}]),
        ({"a \ud83d": "bad \ud83d", "whole": "\ud83d\ude00"}, {"a \ufffd": "bad \ufffd", "whole": "\U0001f600"}),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.time(1, 2), "01:02:00"),
        ([Decimal("1.50"), Decimal(10**30), Decimal("NaN")], [1.5, 10**30, None]),
        ({1: (b"\xff", np.float32(0.5), np.array([1, 2]))}, {"1": ["b'\\xff'", 0.5, [1, 2]]}),
    ],
)
def test_values_become_json(value, expected):
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)


def test_records_of_a_table_can_be_written(tmp_path):
    rows = {"prompt": ["a"], "when": [datetime.datetime(2024, 1, 1)], "cost": [Decimal("1.5")], "n": [[float("nan")]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    assert json.dumps(record.fields, allow_nan=False)
    assert record.fields == {"prompt": "a", "when": "2024-01-01T00:00:00", "cost": 1.5, "n": [None]}


def test_records_of_lines_can_be_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a \\ud83d", "extra": {"score": NaN, "high": 1e999}}\n')
    (record,) = read_records(path)
    assert json.dumps(record.fields, ensure_ascii=False, allow_nan=False).encode()
    assert record.fields == {"prompt": "a \ufffd", "extra": {"score": None, "high": None}}
