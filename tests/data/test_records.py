"""Every source gives the same records, and every mistake is reported with its file and line."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.records import Record, read_records

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


def test_columns_are_made_from_templates(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "Add", "input": "", "output": "3", "ranks": [1]}\n')
    columns = {
        "prompt": "{instruction}\n{input}:{{}}",
        "response": "{output}",
        "order": "{ranks}",
        "output": "<{output}>",
    }
    (record,) = read_records(path, columns)
    assert record.text("prompt") == "Add\n:{}"
    assert record.text("response") == "3"
    assert record.text("output") == "<3>"  # built from the source's columns
    assert record.text("instruction") == "Add"
    assert record.value("order") == [1]  # a template of one field keeps its type


def test_progress_counts_the_bytes_of_the_file(tmp_path):
    path = gzipped(tmp_path)
    read: list[int] = []
    list(read_records(path, progress=read.append))
    assert sum(read) == path.stat().st_size


BROKEN = {
    "json": ("a.jsonl", '{"x": 1}\n\n{"x": 2,}\n', "line 3: not JSON"),
    "torn_line": ("a.jsonl", '{"x": 1}\n{"x": "ab', "line 2: not JSON"),
    "array": ("a.json", '[\n{"x": 1},\n{"x" 2}\n]', "line 3: not JSON"),
    "torn_array": ("a.json", '[\n{"x": 1},\n{"x": 2}\n', "line 4: not JSON"),
    "no_comma": ("a.json", '[\n{"x": 1}\n{"x": 2}]', "line 3: not JSON"),
    "not_an_object": ("a.jsonl", '{"x": 1}\n["a"]\n', "line 2: a record must be an object {...}, not ['a']"),
    "array_item": ("a.json", '[{"x": 1},\n 5]', "line 2: a record must be an object {...}, not 5"),
    "csv_short": ("a.csv", "x,y\n1,2\n3\n", "line 3: the row does not have 2 fields"),
    "csv_long": ("a.csv", "x,y\n1,2,3\n", "line 2: the row does not have 2 fields"),
    "csv_quote": ("a.csv", 'x,y\n"1"2,3\n', "line 2: not CSV"),
    "empty": ("a.jsonl", "\n\n", "empty; at least one record is needed"),
    "empty_array": ("a.json", "[ ]", "empty; at least one record is needed"),
    "empty_text": ("a.txt", "\n \n", "empty; at least one record is needed"),
    "header_only": ("a.csv", "x,y\n", "empty; at least one record is needed"),
    "format": ("a.xml", "<x/>", "a file must end in .jsonl"),
}


@pytest.mark.parametrize(("name", "text", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    said = message(path)
    assert said.startswith(str(path))
    assert expected in said


def test_not_utf8_is_named_with_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    assert "a.jsonl, line 2: not UTF-8" in message(tmp_path / "a.jsonl")


def test_torn_gzip_is_named(tmp_path):
    path = gzipped(tmp_path)
    path.write_bytes(path.read_bytes()[:-12])
    assert f"{path}: cannot be read" in message(path)


def test_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path / "demonstrations.jsonl", JSON_LINES)
    said = message(tmp_path / "demonstration.jsonl")
    assert said == f"{tmp_path / 'demonstration.jsonl'}: no such file or folder (did you mean 'demonstrations.jsonl'?)"


def test_a_name_that_nothing_knows(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = message("nobody/nothing")
    assert said.startswith("nobody/nothing: no such file or folder, and `datasets` cannot load it: Couldn't")
    assert "more" not in said


def test_hub_name_configuration_and_split(monkeypatch):
    calls = []

    def load(name, configuration, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert next(read_records("openai/gsm8k:main#test")).where == "openai/gsm8k:main#test, row 1"
    assert len(list(read_records("plain"))) == 2
    assert calls == [("openai/gsm8k", "main", "test"), ("plain", None, "train")]


def test_splits_that_are_not_there(tmp_path):
    source = saved_splits(tmp_path).replace("#validation", "#valid")
    assert "no split 'valid' (did you mean 'validation'?); there are: train, validation" in message(source)
    assert "has no splits; leave out '#test'" in message(f"{saved(tmp_path)}#test")
    assert "a file has no splits; leave out '#test'" in message(f"{gzipped(tmp_path)}#test")


def test_a_hash_in_a_path_is_no_split(tmp_path):
    assert len(list(read_records(write(tmp_path / "a#1.jsonl", JSON_LINES)))) == 2


RECORD = Record(
    "a.jsonl, line 7", {"prompt": "a", "responce": "b", "n": 5, "none": None, "blank": " \n", "bad": "\ud800"}
)


def test_fields_that_are_not_right_are_named():
    assert RECORD.text("prompt") == "a"
    assert "prompt" in RECORD
    assert "none" not in RECORD
    for read, column, expected in [
        (RECORD.value, "response", "no column 'response' (did you mean 'responce'?); there are: prompt, responce, n"),
        (RECORD.value, "none", "column 'none' is null"),
        (RECORD.text, "n", "column 'n' must hold text, not int 5"),
        (RECORD.text, "bad", "column 'bad' is not valid Unicode"),
        (RECORD.response, "blank", "column 'blank' has an empty response"),
    ]:
        with pytest.raises(UserError) as error:
            read(column)
        assert str(error.value).startswith(f"a.jsonl, line 7: {expected}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{question", "columns.prompt='{question': expected '}'"),
        ("question", "columns.prompt='question': write {name}, and no more, for at least one column"),
        ("{n:>9}", "write {name}, and no more"),
        ("{question}", "line 1: no column 'question'"),
        ("Q: {n}", "line 1: column 'n' must hold text, not int 5"),
    ],
)
def test_templates_that_are_not_right_are_named(tmp_path, template, expected):
    assert expected in message(write(tmp_path / "a.jsonl", '{"n": 5}\n'), {"prompt": template})


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


def test_broken_parquet_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", "nonsense")
    assert message(path).startswith(f"{path}: `datasets` cannot load it: ")


@pytest.mark.parametrize("name", ["records.jsonl", "records.json", "array.json"])
@pytest.mark.parametrize(
    "value", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5_000], ids=["open", "deep", "digits"]
)
def test_json_without_end_is_named_with_the_line(tmp_path, name, value):
    good, bad = '{"prompt": "a"}', f'{{"prompt": {value}}}'
    text = f"[{good},\n{bad}]" if name == "array.json" else f"{good}\n{bad}\n"
    assert "line 2: not JSON" in message(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["A.JSONL.GZ", "a.jsonl.Gz", "A.CSV.GZ"])
def test_endings_in_capitals(tmp_path, name):
    text = "prompt\na\n" if "CSV" in name else '{"prompt": "a"}\n'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [record.text("prompt") for record in read_records(tmp_path / name)] == ["a"]


def test_null_among_the_fields_of_a_template_is_empty(tmp_path):
    records = [{"instruction": "sum", "input": None}, {"instruction": "add", "input": "1 2"}]
    source = write(tmp_path / "alpaca.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    columns = {"prompt": "{instruction}\n{input}\n"}
    assert [record.text("prompt") for record in read_records(source, columns)] == ["sum\n\n", "add\n1 2\n"]
    assert "line 1: column 'input' is null" in message(source, {"prompt": "{input}"})
    assert "line 1: column 'input' is null" in message(source, {"prompt": "{input}{input}"})
    assert "line 1: no column 'inptu'" in message(source, {"prompt": "{instruction}{inptu}"})


def test_a_missing_column_names_its_cure():
    record = Record("f, line 1", {"id": 3, "instruction": "a", "output": "b"})
    for column, source in (("prompt", "instruction"), ("response", "output")):
        with pytest.raises(UserError) as caught:
            record.value(column)
        assert f'data.columns.{column}="{{{source}}}"' in str(caught.value)
    with pytest.raises(UserError) as caught:
        record.value("text")
    assert "data.columns" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"prompt": "a", "answers": []}, "nectar"),
        ({"chosen": "a", "rejected": "b"}, "hh_rlhf"),
    ],
)
def test_a_known_format_is_recognised_where_our_columns_are_missing(write_records, record, format):
    (found,) = read_records(write_records(record))
    with pytest.raises(UserError, match=f"no column 'response'; .*, or data.format={format} "):
        found.value("response")


def test_null_is_empty_among_several_columns_and_missing_where_it_is_optional(write_records):
    path = write_records({"a": "x", "b": None, "who": None})
    (found,) = read_records(path, {"prompt": "{a}\n{b}\n", "user": "{who}", "messages": "{who}"})
    assert found.fields["prompt"] == "x\n\n"
    assert "user" not in found and "messages" not in found
