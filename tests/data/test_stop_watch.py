"""Where a stop text ends a response: token by token, compared with decoding the whole, and with transformers' own criterion."""

import random

import pytest
import torch
from tokenizer_folders import KINDS
from transformers.generation.stopping_criteria import StopStringCriteria

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import load_tokenizer

STOPS = [["\n\nHuman:", "END"], ["é"], [" the"], ["ab", "zx", "x\n", " x"], ["e"]]
PIECES = ["\n", "\n\nHuman", ":", "EN", "D", " END", "caf", "é", "à", "東京", " the", "then", "a", "b", "z", " ", "x"]


def first_end(tokenizer, tokens, texts):
    """The first token with which the decoded response, read whole each time, holds one of the texts."""
    for count in range(1, len(tokens) + 1):
        whole = tokenizer.decode(tokens[:count], continuation=True, skip_special_tokens=False).rstrip("\ufffd")
        if any(text in whole for text in texts):
            return count
    return None


def watched_end(tokenizer, tokens):
    watch = tokenizer.stop_watch()
    return next((count for count, token in enumerate(tokens, start=1) if watch(token)), None)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "llama3"])
@pytest.mark.parametrize("texts", STOPS, ids=str)
def test_it_ends_where_the_whole_text_first_holds_one(tmp_path, shared_data, kind, texts):
    folder = KINDS[kind](tmp_path / kind, shared_data)
    tokenizer = load_tokenizer(folder)
    tokenizer.stop_also_at(texts)
    noise, found = random.Random(0), 0
    theirs = StopStringCriteria(tokenizer.hf, texts)
    for _ in range(40):
        text = "".join(noise.choices(PIECES, k=12))
        tokens = tokenizer.encode(text, continuation=True)
        end = watched_end(tokenizer, tokens)
        assert end == first_end(tokenizer, tokens, texts), text
        found += end is not None
        if kind == "gpt2":  # transformers' knows neither continuations nor incomplete characters
            stops = [bool(theirs(torch.tensor([tokens[:count]]), None)[0]) for count in range(1, len(tokens) + 1)]
            assert end == (stops.index(True) + 1 if any(stops) else None), text
    assert found >= 5


def test_after_an_end_it_waits_for_the_next(tmp_path, shared_data):
    """A response that must continue is not ended by a stop text it already contained."""
    tokenizer = load_tokenizer(KINDS["llama3"](tmp_path / "t", shared_data))
    tokenizer.stop_also_at(["ab"])
    watch = tokenizer.stop_watch()
    assert [watch(token) for token in tokenizer.encode("abcab")] == [False, True, False, False, True]


def test_special_tokens_by_their_text_are_tokens(tmp_path, shared_data):
    tokenizer = load_tokenizer(KINDS["llama3"](tmp_path / "t", shared_data))
    assert tokenizer.stop_watch() is None
    tokenizer.stop_also_at(["<|head|>", "ab"])
    assert set(tokenizer.stop_ids) == {257, 258, 259}
    assert tokenizer.stop_texts == ("ab",)
    with pytest.raises(UserError, match=r"data\.stop has an empty text"):
        tokenizer.stop_also_at([""])
