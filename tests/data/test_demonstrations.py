"""Demonstrations: their tokens, what is dropped, what is refused, and real files."""

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.tokenizer import load_tokenizer


def test_tokens_are_prompt_response_and_end(tokenizer, write_records):
    path = write_records({"prompt": "ab", "response": "cde"})
    (item,) = load_demonstrations(path, tokenizer, 10, 10, 20)
    assert item.tokens.tolist() == [*tokenizer.encode("ab"), *tokenizer.encode("cde"), tokenizer.eos_id]
    assert item.prompt_length == 2


def test_limits_include_the_end_and_drop_whole_records(tokenizer, write_records):
    path = write_records(
        {"prompt": "abcd", "response": "xyz"},  # exactly 4, 3 + 1, 8
        {"prompt": "abcde", "response": "x"},
        {"prompt": "a", "response": "wxyz"},
    )
    examples = load_demonstrations(path, tokenizer, max_prompt_tokens=4, max_response_tokens=4, max_length=8)
    assert [len(item.tokens) for item in examples] == [8]
    assert examples.dropped == {"prompt_too_long": 1, "response_too_long": 1}
    assert examples.describe() == "1 of 3 records kept; dropped: 1 prompt_too_long, 1 response_too_long"
    with pytest.raises(UserError) as error:
        load_demonstrations(path, tokenizer, 4, 4, max_length=7)
    assert str(error.value).startswith(f"{path}: nothing left")
    assert "1 total_too_long" in str(error.value)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "response": ""}, "column 'response' has an empty response ''"),
        ({"prompt": "a", "response": " \n"}, "has an empty response"),
        ({"prompt": "a"}, "no column 'response'; there are: prompt"),
        ({"prompt": "", "response": "a"}, "the prompt is empty; this tokenizer has no beginning-of-text token"),
        ({"prompt": 5, "response": "a"}, "column 'prompt' must hold text, not int 5"),
        ({"prompt": "a", "response": ["b"]}, "column 'response' must hold text, not list ['b']"),
    ],
)
def test_mistakes_are_named_with_the_line(tokenizer, write_records, record, expected):
    path = write_records({"prompt": "a", "response": "b"}, record)
    with pytest.raises(UserError) as error:
        load_demonstrations(path, tokenizer, 10, 10, 20)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        ("instruction_1100.json", {"prompt": "{instruction}\n{input}\n", "response": "{output}"}, 1100),
        ("gsm8k_train.jsonl", {"prompt": "{question}\n", "response": "{answer}"}, 7473),
    ],
)
def test_real_files(shared_data, name, columns, count):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    examples = load_demonstrations(shared_data / name, tokenizer, 1024, 1024, 2048, columns)
    assert len(examples) == count
    assert not examples.dropped
    assert examples[0].tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(examples[0].tokens[: examples[0].prompt_length]).endswith("\n")
