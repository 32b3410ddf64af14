"""What is wrong in a format of one's own, and in records of a known one, is said before anything is trained."""

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.records import read_records


def said(path, format, kind="demonstrations", chat=False):
    with pytest.raises(UserError) as error:
        list(read_records(path, Shape.of(str(format), chat=chat), kind=kind))
    return str(error.value)


EACH = 'each: "{m}", role: "{r}", content: "{c}"'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("columns: {prompt: {first: 3}}", "columns.prompt: first must be a list of templates, not 3"),
        ("columns: {prompt: {first: []}}", "columns.prompt: first must be a list of templates, not []"),
        ('columns: {prompt: {first: ["{a}", 3]}}', "columns.prompt: a template is text, not 3"),
        ('columns: {messages: {each: "{m}"}}', "must hold each, role, content (and roles), and no more"),
        (f"columns: {{messages: {{{EACH}, roles: [a]}}}}", "columns.messages: roles must be names by names"),
        (f"columns: {{messages: {{{EACH}, roles: {{a: 5}}}}}}", "columns.messages: roles must be names by names"),
        ('columns: {messages: {each: "{m}", role: 3, content: "{c}"}}', "columns.role: a template is text, not 3"),
        ('columns: {ranks: {best: "{x}"}}', "must hold best, of, and no more"),
        ('columns: {ranks: {best: "{x}", of: two}}', "columns.ranks: of must be how many responses there are"),
        ('columns: {ranks: {best: "{x}", of: 2, worst: 3}}', "must hold best, of, and no more"),
        ('columns: {promt: "{prompt}"}', "columns.promt: no such column is read (did you mean 'prompt'?)"),
        ('columns: {1: "{prompt}"}', "columns.1: no such column is read; there are: prompt, "),
        ("tree: {roles: 3}", "tree: roles must say which are user and assistant"),
        ("tree: {roles: {prompter: user}}", "tree: roles must say which are user and assistant"),
        ("tree: {text: 3}", "tree: text must be text, not 3"),
        ('tree: {mark: "{foo}:"}', "tree: mark may hold {role}, and no other name in braces"),
        ("dialogue: {user: 3}", "dialogue: user and assistant must be two different texts"),
        ('dialogue: {user: ""}', "dialogue: user and assistant must be two different texts"),
        ("dialogue: {user: x, assistant: x}", "dialogue: user and assistant must be two different texts"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_a_format_of_ones_own(tmp_path, write_records, content, says, chat):
    format = tmp_path / "own.yaml"
    format.write_text(content)
    found = said(write_records({"prompt": "q"}), format, chat=chat)
    assert found.startswith(f"data.format={format}: {format}: ")
    assert says in found


def test_other_columns_may_be_made():
    columns = {"answer": "{gold}", "prompt_id": "{id}", "order": "{n}", "test": "{test}"}
    assert set(Shape.of(columns=columns).columns) == set(columns)


NODE = {"text": "q", "role": "prompter", "message_id": "m"}
REPLY = {"text": "a", "role": "assistant", "rank": 0}


def tree(**fields):
    return {"message_tree_id": "t", "prompt": {**NODE, **fields}}


@pytest.mark.parametrize(
    ("format", "record", "says"),
    [
        ("oasst", tree(replies=5), "'replies' must be a list of messages, not 5"),
        ("oasst", tree(replies=[None]), "'replies' must be a list of messages, not [None]"),
        (
            "oasst",
            tree(replies=[REPLY, {**REPLY, "rank": "1"}]),
            "'rank' must be a whole number, 0 for the best, or null",
        ),
        (
            "oasst",
            tree(replies=[{**REPLY, "rank": 0.5}]),
            "'rank' must be a whole number, 0 for the best, or null, not 0.5",
        ),
        ("oasst", {**NODE, "message_id": ["m"]}, "column 'message_id' must name a message, not ['m']"),
        ("oasst", {**NODE, "parent_id": {"a": 1}}, "column 'parent_id' must name a message, not {'a': 1}"),
        (
            "sharegpt",
            {"conversations": [{"from": ["human"], "value": "q"}]},
            "turn 1: {from} must be a role's name, not",
        ),
        (
            "ultrafeedback",
            {"instruction": "q", "completions": [{"response": "a", "overall_score": 10**400}]},
            "must hold numbers, not 1000",
        ),
        (
            "alpaca",
            {"prompt": "q", "responses": ["a", "b"], "ranks": [0, "1"]},
            "column 'ranks' must hold a whole number",
        ),
        (
            "alpaca",
            {"prompt": "q", "responses": ["a"], "ranks": [1, 0]},
            "whole number for each of 1 responses, not [1, 0]",
        ),
    ],
)
def test_a_record_of_a_known_format(write_records, format, record, says):
    path = write_records(record)
    found = said(path, format)
    assert found.startswith(f"{path}, line 1")
    assert says in found
