"""Prompts: stable ids, limits, duplicates."""

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.tokenizer import load_tokenizer


def test_ids_are_places_in_the_source_whatever_is_dropped(tokenizer, write_records):
    path = write_records({"prompt": "much too long"}, {"prompt": "ab", "user": "eva"}, {"prompt": "c", "user": None})
    prompts = load_prompts(path, tokenizer, max_prompt_tokens=2)
    assert [(prompt.id, prompt.text, prompt.user) for prompt in prompts] == [(1, "ab", "eva"), (2, "c", None)]
    assert prompts[0].tokens.tolist() == tokenizer.encode("ab")
    assert prompts.dropped == {"prompt_too_long": 1}


def test_user_limit_keeps_the_first_and_spares_prompts_without_user(tokenizer, write_records):
    users = ["a", "a", "b", "a", None, None, None, "", " ", ""]
    path = write_records(*({"prompt": f"p{i}", "user": user} for i, user in enumerate(users)))
    prompts = load_prompts(path, tokenizer, 10, max_per_user=2)
    assert [prompt.id for prompt in prompts] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [prompt.user for prompt in prompts] == ["a", "a", "b"] + [None] * 6, "a blank user is none"
    assert prompts.dropped == {"over_user_limit": 1}


def test_duplicates_by_prefix(tokenizer, write_records):
    path = write_records(*({"prompt": text} for text in ["abcX", "abcY", "abd", "abc", "abc", "ab", "ab"]))
    assert len(load_prompts(path, tokenizer, 10)) == 7
    prompts = load_prompts(path, tokenizer, 10, deduplicate_prefix_tokens=3)
    assert [prompt.text for prompt in prompts] == ["abcX", "abd", "ab"]
    assert prompts.dropped == {"duplicate": 4}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"text": "a"}, "no column 'prompt'; there are: text"),
        ({"prompt": ["a"]}, "column 'prompt' must hold text, not list"),
        ({"prompt": "a", "user": [5]}, "column 'user' must hold a text or a whole number, not list"),
    ],
)
def test_mistakes_are_named_with_the_line(tokenizer, write_records, record, expected):
    path = write_records({"prompt": "a"}, record)
    with pytest.raises(UserError) as error:
        load_prompts(path, tokenizer, 10)
    assert str(error.value).startswith(f"{path}, line 2: {expected}")


def test_nothing_short_enough(tokenizer, write_records):
    with pytest.raises(UserError, match="dropped: 1 prompt_too_long"):
        load_prompts(write_records({"prompt": "abc"}), tokenizer, 2)


def test_beginning_of_text_makes_an_empty_prompt_usable(tokenizer, write_records, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 0)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|pad|>")
    hf.save_pretrained(tmp_path / "begins")
    prompts = load_prompts(write_records({"prompt": ""}), load_tokenizer(tmp_path / "begins"), 10)
    assert prompts[0].tokens.tolist() == [0]
