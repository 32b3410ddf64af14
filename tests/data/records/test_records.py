"""Every source gives the same records, and each knows its line."""

import gzip
import json

import datasets
import pytest
from record_sources import JSON_LINES, ROWS, dataset_folder, gzipped, parquet, saved, saved_splits, write

from megatron_rlhf.data.records import read_records

SOURCES = {
    "jsonl": lambda folder: write(folder / "a.jsonl", JSON_LINES.replace("\n", "\n\n")),
    "bom": lambda folder: write(folder / "a.jsonl", "\ufeff" + JSON_LINES),
    "json_array": lambda folder: write(folder / "a.json", json.dumps(ROWS, indent=2)),
    "json_lines": lambda folder: write(folder / "a.json", JSON_LINES),
    "csv": lambda folder: write(folder / "a.csv", 'prompt,response\n"a\nb",é\nc,2020-01-01\n'),
    "gz": gzipped,
    "parquet": parquet,
    "saved": saved,
    "saved_splits": saved_splits,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_all_sources_give_the_same_records(make, tmp_path):
    assert [dict(record.fields) for record in read_records(make(tmp_path))] == ROWS


def test_folder_of_files_is_read_through_datasets_without_output(tmp_path, capfd):
    assert [record.text("response") for record in read_records(dataset_folder(tmp_path))] == ["é", "text"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": 2}\n', [1, 3]),
        ("a.json", '[\n\n {"x": 1},{"x": 2},\n {\n"x": 3}\n]', [3, 3, 4]),
        ("a.csv", 'x,y\n"1\n2",3\n4,5\n', [2, 4]),
        ("a.csv", "\nx,y,,\n\n1,2,,\n\n\n3,4,,\n", [4, 7]),  # as spreadsheets write empty columns
        ("a.txt", "\none\ntwo\n<|endoftext|>\n\nthree\n", [2, 6]),
    ],
)
def test_records_know_their_lines(tmp_path, name, text, lines):
    path = write(tmp_path / name, text)
    assert [record.where for record in read_records(path)] == [f"{path}, line {line}" for line in lines]


def test_marked_text_is_cut_at_the_marks_only(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n<|endoftext|>\n<|endoftext|>\nthree" + "\n\nmore" * 2000)
    assert [len(record.text("text").split()) for record in read_records(path)] == [2, 2001]


def test_unmarked_text_is_cut_at_blank_lines_after_4096_characters(tmp_path):
    paragraphs = ["x" * 1999 + str(i) for i in range(5)]
    path = write(tmp_path / "a.txt", "\n\n".join(paragraphs))
    assert [record.text("text") for record in read_records(path)] == [
        "\n\n".join(paragraphs[:3]),
        "\n\n".join(paragraphs[3:]),
    ]


def test_progress_counts_the_bytes_of_the_file(tmp_path):
    path = gzipped(tmp_path)
    read: list[int] = []
    list(read_records(path, progress=read.append))
    assert sum(read) == path.stat().st_size


def test_hub_name_configuration_and_split(monkeypatch):
    calls = []

    def load(name, configuration, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert next(read_records("openai/gsm8k:main#test")).where == "openai/gsm8k:main#test, row 1"
    assert len(list(read_records("plain"))) == 2
    assert calls == [("openai/gsm8k", "main", "test"), ("plain", None, "train")]


def test_a_hash_in_a_path_is_no_split(tmp_path):
    assert len(list(read_records(write(tmp_path / "a#1.jsonl", JSON_LINES)))) == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("instruction_1100.json", 1100),
        ("gsm8k_train.jsonl", 7473),
        ("oasst_ranked_212.jsonl", 212),
        ("qa_feedback_k4_400.jsonl", 400),
        ("hh_harmless_1800.jsonl.gz", 1800),
    ],
)
def test_real_files(shared_data, name, count):
    assert sum(1 for _ in read_records(shared_data / name)) == count


@pytest.mark.parametrize("name", ["A.JSONL.GZ", "a.jsonl.Gz", "A.CSV.GZ"])
def test_endings_in_capitals(tmp_path, name):
    text = "prompt\na\n" if "CSV" in name else '{"prompt": "a"}\n'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [record.text("prompt") for record in read_records(tmp_path / name)] == ["a"]
