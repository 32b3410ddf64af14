"""Files that cannot be read are reported with the file and the line."""

import datasets
import pytest
from record_sources import JSON_LINES, gzipped, message, saved, saved_splits, write

BROKEN = {
    "json": ("a.jsonl", '{"x": 1}\n\n{"x": 2,}\n', "line 3: not JSON"),
    "torn_line": ("a.jsonl", '{"x": 1}\n{"x": "ab', "line 2: not JSON"),
    "array": ("a.json", '[\n{"x": 1},\n{"x" 2}\n]', "line 3: not JSON"),
    "torn_array": ("a.json", '[\n{"x": 1},\n{"x": 2}\n', "line 4: not JSON"),
    "no_comma": ("a.json", '[\n{"x": 1}\n{"x": 2}]', "line 3: not JSON"),
    "not_an_object": ("a.jsonl", '{"x": 1}\n["a"]\n', "line 2: a record must be an object {...}, not ['a']"),
    "two_arrays": ("a.json", '[{"x": 1}]\n\n[{"x": 2}]', "line 3: not JSON: one array is all that a file may hold"),
    "behind_array": ("a.json", '[{"x": 1}]}', "line 1: not JSON: one array is all"),
    "lines_in_record": ("a.json", '{\n"x": 1\n}', "line 1: not JSON that ends on its line; write each record on"),
    "key_twice": (
        "a.jsonl",
        '{"x": 1}\n{"y": {"x": 1, "x": 2}}',
        "line 2: not JSON that can be read: an object has the key 'x'",
    ),
    "key_twice_in_array": ("a.json", '[{"x": 1},\n{"x": 1, "x": 2}]', "line 2: not JSON that can be read: an object"),
    "array_item": ("a.json", '[{"x": 1},\n 5]', "line 2: a record must be an object {...}, not 5"),
    "csv_short": ("a.csv", "x,y\n1,2\n3\n", "line 3: the row does not have 2 fields"),
    "csv_long": ("a.csv", "x,y\n1,2,3\n", "line 2: the row does not have 2 fields"),
    "csv_behind_blank_lines": ("a.csv", "x,y\n\n\n1,2\n\n3\n", "line 6: the row does not have 2 fields"),
    "csv_column_twice": ("a.csv", "\nx,y,y\n1,2,3\n", "line 2: two columns have the name 'y'"),
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


def test_splits_that_are_not_there(tmp_path):
    source = saved_splits(tmp_path).replace("#validation", "#valid")
    assert "no split 'valid' (did you mean 'validation'?); there are: train, validation" in message(source)
    assert "has no splits; leave out '#test'" in message(f"{saved(tmp_path)}#test")
    assert "a file has no splits; leave out '#test'" in message(f"{gzipped(tmp_path)}#test")


def test_broken_parquet_is_named_once(tmp_path, caplog):
    path = write(tmp_path / "a.parquet", "nonsense")
    assert message(path).startswith(f"{path}: `datasets` cannot load it: ")
    assert not caplog.records


def test_more_levels_than_can_be_read_are_named_with_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": ' + "[" * 800 + "]" * 800 + "}")
    assert message(path).startswith(f"{path}, line 1: objects or lists inside of each other")


@pytest.mark.parametrize("name", ["records.jsonl", "records.json", "array.json"])
@pytest.mark.parametrize(
    "value", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5_000], ids=["open", "deep", "digits"]
)
def test_json_without_end_is_named_with_the_line(tmp_path, name, value):
    good, bad = '{"prompt": "a"}', f'{{"prompt": {value}}}'
    text = f"[{good},\n{bad}]" if name == "array.json" else f"{good}\n{bad}\n"
    assert "line 2: not JSON" in message(write(tmp_path / name, text))
