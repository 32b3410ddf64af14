"""Text token by token, compared with decoding the whole; where a stop text ends it, also with transformers' own criterion."""

import random

import pytest
import torch
from tokenizer_folders import KINDS
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers.generation.stopping_criteria import StopStringCriteria

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.streaming import StopWatch, TextStream
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


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: a character that is no token is its bytes, and bytes in a row are decoded together."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "▁a", "▁b"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "b")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def test_bytes_that_are_text_are_its_characters(byte_fallback):
    stream, text = TextStream(byte_fallback, skip_special_tokens=False), "a b\n東京 é🎉🎉c"
    pieces = [stream.step(token) for token in byte_fallback.encode(text).ids]
    assert "".join(pieces) == text
    assert {"東", "🎉", " b"} <= set(pieces), "a character comes whole"


def test_bytes_that_are_no_text_end_nothing(byte_fallback):
    """The decoder takes back what it made of the bytes before them."""
    number = byte_fallback.token_to_id
    cut = [number(f"<0x{byte:02X}>") for byte in "1🎉".encode()[:-1]]
    watch = StopWatch(byte_fallback, ["1", "ab"])
    assert [watch(token) for token in [*cut, number("a"), number("b")]] == [True, False, False, False, False, True]
    noise = random.Random(1)
    for _ in range(100):
        stream = TextStream(byte_fallback, skip_special_tokens=False)
        tokens = [*noise.choices(range(byte_fallback.get_vocab_size()), k=60), number("c"), number("a"), number("b")]
        assert "".join(map(stream.step, tokens)).endswith("cab")
