"""Trained and real tokenizers: ids, special tokens, and text that is preserved across the border between prompt and response."""

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import load_tokenizer, require_tokenizer_fits, train_tokenizer

TEXTS = ["the cat sat on the mat, the cat sat", "the dog ate the cat's mat", "über naïve 東京"]


def test_trained_tokenizer(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path / "a")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.bos_id) == (0, 1, (1,), None)
    assert tokenizer.vocab_size <= 300
    ids = tokenizer.encode("the cat 東京 \n x")
    assert len(ids) < len("the cat 東京 \n x".encode())  # merges are applied
    assert tokenizer.decode(ids) == "the cat 東京 \n x"
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")  # there is no beginning-of-text token


def test_training_is_deterministic_and_survives_the_disk(tmp_path):
    first = train_tokenizer(TEXTS, 300, tmp_path / "a")
    second = train_tokenizer(iter(TEXTS), 300, tmp_path / "b")
    again = load_tokenizer(tmp_path / "a")
    hugging_face = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert first.fingerprint == second.fingerprint == again.fingerprint
    assert train_tokenizer(TEXTS[:1], 300, tmp_path / "c").fingerprint != first.fingerprint
    assert (again.pad_id, again.eos_id) == (0, 1)
    assert hugging_face(TEXTS[2], add_special_tokens=False).input_ids == first.encode(TEXTS[2])


def test_smallest_vocabulary(tmp_path):
    assert train_tokenizer(["aa aa"], 259, tmp_path).vocab_size == 259
    with pytest.raises(UserError, match="vocab_size=258: must be at least 259"):
        train_tokenizer(["aa"], 258, tmp_path)


def test_stream_is_encode_of_each(tokenizer):
    texts = [f"text {i}" for i in range(2001)]
    streamed = list(tokenizer.encode_stream(iter(texts)))
    assert len(streamed) == 2001
    assert streamed[0].dtype == np.int32
    assert [ids.tolist() for ids in streamed[::1000]] == [tokenizer.encode(text) for text in texts[::1000]]


def test_decode_takes_tensors_and_can_show_special_tokens(tokenizer):
    ids = np.array([*tokenizer.encode("hi"), tokenizer.eos_id, tokenizer.pad_id])
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi<|endoftext|><|pad|>"


def test_require_tokenizer_fits(tokenizer):
    require_tokenizer_fits(tokenizer, 259, "model.vocab_size")
    with pytest.raises(UserError, match=r"model.vocab_size=258: .* has 259 ids.* at least 259"):
        require_tokenizer_fits(tokenizer, 258, "model.vocab_size")


def test_folders_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no fast tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no fast tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_of_text(tmp_path, tokenizer):
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf.backend_tokenizer)
    definition = hf.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>")
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(definition)
    with pytest.raises(UserError, match="no end-of-text token; set eos_token"):
        load_tokenizer(tmp_path)


def test_beginning_of_text_that_the_tokenizer_itself_leaves_out(tmp_path, tokenizer):
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.hf.backend_tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.start_ids == ()
    assert loaded.encode("a", bos=True) == tokenizer.encode("a")
    assert loaded.pad_id == 0  # its padding token is the end of text, which padding must not be


def test_gpt2(shared_data):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (50257, 50256, None, 0)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" world", continuation=True) == [995]


def test_llama_style(shared_data):
    tokenizer = load_tokenizer(shared_data / "tinystories_260k")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (512, 1, 2, 0)
    hello = [346, 306, 414, 263, 304, 341]
    assert tokenizer.encode("Hello world") == hello
    assert tokenizer.encode_batch(["Hello world"], bos=True) == [hello]  # the same as by its own post-processor


@pytest.mark.parametrize("folder", ["gpt2_tokenizer", "tinystories_260k"])
@pytest.mark.parametrize("response", [" there was a", "there was a", "  two spaces", "\nnew line", "ing é"])
def test_prompt_and_response_decode_to_themselves(shared_data, folder, response):
    tokenizer = load_tokenizer(shared_data / folder)
    prompt_ids = tokenizer.encode("Once upon a time", bos=True)
    response_ids = tokenizer.encode(response, continuation=True)
    assert tokenizer.decode(response_ids, continuation=True) == response
    assert tokenizer.decode(prompt_ids + response_ids) == "Once upon a time" + response


def test_llama_style_continuation_is_what_the_whole_text_encodes_to(shared_data):
    tokenizer = load_tokenizer(shared_data / "tinystories_260k")
    parts = tokenizer.encode("Once upon a time,") + tokenizer.encode(" there was a girl", continuation=True)
    assert parts == tokenizer.encode("Once upon a time, there was a girl")
