"""Comparisons: three formats, what is dropped, what is refused, and real rankings."""

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.tokenizer import load_tokenizer

LIMITS = {"max_prompt_tokens": 100, "max_response_tokens": 100, "max_length": 200}


def described(tokenizer, comparison):
    responses = [tokenizer.decode(ids, skip_special_tokens=False) for ids in comparison.responses_tokens]
    return tokenizer.decode(comparison.prompt_tokens), responses, comparison.pairs[:, :2].tolist()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"prompt": "p", "responses": ["x", " y", "z"], "ranks": [1, 0, 1]},
            ("p", ["x<|endoftext|>", " y<|endoftext|>", "z<|endoftext|>"], [[1, 0], [1, 2]]),
        ),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, ("p", ["x<|endoftext|>", "y<|endoftext|>"], [[0, 1]])),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b c", "rejected": "\n\nHuman: a\n\nAssistant: b d"},
            ("\n\nHuman: a\n\nAssistant:", [" b c<|endoftext|>", " b d<|endoftext|>"], [[0, 1]]),
        ),
        (  # the dialogues differ from the second answer on; the first belongs to the prompt
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            },
            (
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
                [" d<|endoftext|>", " e<|endoftext|>"],
                [[0, 1]],
            ),
        ),
    ],
    ids=["ranked", "pair", "dialogue", "long_dialogue"],
)
def test_formats(tokenizer, write_records, record, expected):
    (comparison,) = load_comparisons(write_records(record), tokenizer, **LIMITS)
    assert described(tokenizer, comparison) == expected


def test_sets_keep_their_own_responses_when_others_are_dropped(tokenizer, write_records):
    path = write_records(
        {"prompt": "longer than eight", "responses": ["lost", "list"], "ranks": [0, 1]},
        {"prompt": "tie", "responses": ["one", "two"], "ranks": [2, 2]},
        {"prompt": "long", "responses": ["a", "much too long", "b", "c"], "ranks": [2, 0, 1, 1]},
        {"prompt": "one left", "responses": ["a", "much too long"], "ranks": [0, 1]},
        {"prompt": "no pair", "responses": ["much too long", "a", "b"], "ranks": [0, 1, 1]},
        {"prompt": "fine", "responses": ["a", "b"], "ranks": [5, 3]},
    )
    examples = load_comparisons(path, tokenizer, max_prompt_tokens=8, max_response_tokens=5, max_length=12)
    end = "<|endoftext|>"
    assert [described(tokenizer, comparison) for comparison in examples] == [
        ("long", [f"a{end}", f"b{end}", f"c{end}"], [[1, 0], [2, 0]]),
        ("fine", [f"a{end}", f"b{end}"], [[1, 0]]),
    ]
    assert examples.dropped == {"prompt_too_long": 1, "all_tied": 1, "response_too_long": 2}
    assert examples.left_out == {"response_too_long": 1}
    assert examples.records + sum(examples.dropped.values()) == 6
    assert examples.describe() == (
        "2 of 6 records kept; left out of them: 1 response_too_long; dropped: 1 all_tied, 1 prompt_too_long, 2 response_too_long"
    )
    assert examples.warning() == (
        f"{path}: 67% of the records are dropped: 1 all_tied, 1 prompt_too_long, 2 response_too_long; the limit that binds: "
        "data.max_response_tokens=5"
    )


def test_total_length_counts_prompt_and_response(tokenizer, write_records):
    path = write_records({"prompt": "four", "responses": ["a", "abc", "abcd"], "ranks": [0, 1, 2]})
    examples = load_comparisons(path, tokenizer, 100, 100, max_length=8)
    assert [len(response) for response in examples[0].responses_tokens] == [2, 4]
    assert (examples.dropped, examples.left_out) == ({}, {"total_too_long": 1})


def test_records_of_one_prompt_are_one_element(tokenizer, write_records):
    """Each record's responses are compared only with each other, and a response in several records is stored once."""
    path = write_records(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "user": "eva"},
        {"prompt": "p", "responses": ["c", "a", "d"], "ranks": [1, 0, 1], "user": "eva"},
        {"prompt": "p", "chosen": "b", "rejected": "a", "user": "tom"},
    )
    examples = load_comparisons(path, tokenizer, **LIMITS)
    end = "<|endoftext|>"
    first, second = examples
    # a over b; a over c and d, which tie; b over a. b is not compared with c or d.
    texts = [f"{text}{end}" for text in "abcd"]
    assert described(tokenizer, first) == ("p", texts, [[0, 1], [0, 2], [0, 3], [1, 0]])
    assert described(tokenizer, second) == ("q", texts[:2], [[0, 1]])
    assert first.pairs[:, 2].tolist() == [2, 3, 3, 2], "how many were ranked together"
    assert first.best == (0, 0, 1)
    assert (first.users, second.users) == ({"eva", "tom"}, {"eva"})
    assert examples.describe() == "4 of 4 records kept as 2 examples; dropped: none"


def test_equal_responses_say_nothing(tokenizer, write_records):
    path = write_records(
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "responses": ["a", "b", "a"], "ranks": [0, 1, 2]},
        {"prompt": "r", "responses": ["x", "x", "much too long"], "ranks": [0, 1, 2]},
    )
    examples = load_comparisons(path, tokenizer, 10, 5, 20)
    end = "<|endoftext|>"
    assert [described(tokenizer, one) for one in examples] == [("q", [f"a{end}", f"b{end}"], [[0, 1], [1, 0]])]
    assert examples.dropped == {"equal_responses": 1, "response_too_long": 1}


def test_dialogue_that_ends_without_an_answer_is_dropped(tokenizer, write_records):
    start = "\n\nHuman: a\n\nAssistant:"
    path = write_records(
        {"chosen": f"{start} b", "rejected": start}, {"chosen": f"{start} b", "rejected": f"{start} c"}
    )
    examples = load_comparisons(path, tokenizer, **LIMITS)
    assert len(examples) == 1
    assert examples.dropped == {"empty_response": 1}


def test_only_ties_is_nothing_to_train_on(tokenizer, write_records):
    path = write_records({"prompt": "p", "responses": ["x", "y"], "ranks": [0, 0]})
    with pytest.raises(UserError, match=r"nothing left to train on: 0 of 1 records kept; dropped: 1 all_tied"):
        load_comparisons(path, tokenizer, **LIMITS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"responses": ["x"], "ranks": [0]}, "column 'responses' must be a list of two texts or more, not ['x']"),
        ({"responses": "xy"}, "column 'responses' must be a list of two texts or more, not 'xy'"),
        ({"ranks": [0]}, "column 'ranks' has 1 numbers for 2 responses"),
        ({"ranks": [0, 1, 2]}, "column 'ranks' has 3 numbers for 2 responses"),
        ({"ranks": [0, 0.5]}, "whole numbers from 0 (the best) up, not [0, 0.5]"),
        ({"ranks": [0, "1"]}, "whole numbers from 0 (the best) up, not [0, '1']"),
        ({"ranks": [-1, 0]}, "whole numbers from 0 (the best) up, not [-1, 0]"),
        ({"ranks": [True, False]}, "whole numbers from 0 (the best) up, not [True, False]"),
        ({"ranks": 1}, "whole numbers from 0 (the best) up, not 1"),
        ({"responses": ["x", ""]}, "column 'responses' has an empty response ''"),
        ({"responses": ["x", None]}, "column 'responses' must hold text, not NoneType None"),
        ({"ranks": None}, "column 'ranks' is null"),
        ({"prompt": 1}, "column 'prompt' must hold text, not int 1"),
    ],
)
def test_mistakes_in_ranked_lists(tokenizer, write_records, change, expected):
    good = {"prompt": "p", "responses": ["x", "y"], "ranks": [0, 1]}
    path = write_records(good, good | change)
    with pytest.raises(UserError) as error:
        load_comparisons(path, tokenizer, **LIMITS)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p"}, "no column 'responses'; there are: prompt"),
        ({"prompt": "p", "respones": ["x", "y"]}, "no column 'responses' (did you mean 'respones'?)"),
        ({"prompt": "p", "responses": ["x", "y"]}, "no column 'ranks'"),
        ({"responses": ["x", "y"], "ranks": [0, 1]}, "no column 'prompt'"),
        ({"prompt": "p", "chosen": "x"}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": "x", "rejected": " "}, "column 'rejected' has an empty response ' '"),
        ({"chosen": "x", "rejected": "y"}, "share no '\\n\\nAssistant:'"),
        ({"chosen": "x", "rejected": ["y"]}, "column 'rejected' must hold text, not list"),
    ],
)
def test_mistakes_in_the_format(tokenizer, write_records, record, expected):
    path = write_records(record)
    with pytest.raises(UserError) as error:
        load_comparisons(path, tokenizer, **LIMITS)
    assert str(error.value).startswith(f"{path}, line 1: ")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "kept", "dropped", "left_out"),
    [
        ("oasst_ranked_212.jsonl", 207, {"prompt_too_long": 4, "response_too_long": 1}, {"response_too_long": 2}),
        ("qa_feedback_k4_400.jsonl", 390, {"all_tied": 10}, {}),
        ("hh_harmless_1800.jsonl.gz", 1796, {"empty_response": 4}, {}),
    ],
)
def test_real_rankings(shared_data, name, kept, dropped, left_out):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    examples = load_comparisons(shared_data / name, tokenizer, 1024, 1024, 2048)
    assert examples.records == kept
    assert (examples.dropped, examples.left_out) == (dropped, left_out)
    assert kept - 2 <= len(examples) <= kept, "two prompts of hh-rlhf come twice"
