"""Columns of a record: made from templates, and named where they are missing or wrong."""

import json

import pytest
from record_sources import message, write

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.records import Record, read_records


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


RECORD = Record("a.jsonl, line 7", {"prompt": "a", "responce": "b", "n": 5, "none": None, "blank": " \n"})


def test_fields_that_are_not_right_are_named():
    assert RECORD.text("prompt") == "a"
    assert "prompt" in RECORD
    assert "none" not in RECORD
    for read, column, expected in [
        (RECORD.value, "response", "no column 'response' (did you mean 'responce'?); there are: prompt, responce, n"),
        (RECORD.value, "none", "column 'none' is null"),
        (RECORD.text, "n", "column 'n' must hold text, not int 5"),
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
