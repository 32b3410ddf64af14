"""Beginnings and ends of texts are what the folder says: compared with transformers' own ids for the same folder."""

import json

import numpy as np
import pytest
import tokenizer_folders
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizer_folders import KINDS, llama3, sentencepiece, word_level, write_json
from transformers import AutoTokenizer, GenerationConfig

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.pretraining import build_indexed_dataset, load_pretraining
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.tokenizer import load_tokenizer

TEXTS = ["Once upon a time", "  two spaces", "a\nb", ""]
STARTS = {
    "opt": 1,
    "opt_without_beginning": None,
    "llama3": 256,
    "llama3_base": 256,
    "sentencepiece": 1,
    "tinystories": None,
    "gpt2": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_as_transformers_begins_it(tmp_path, shared_data, kind):
    folder = KINDS[kind](tmp_path / kind, shared_data)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text, bos=True) == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.start_ids == (() if STARTS[kind] is None else (STARTS[kind],))


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_begins_its_texts_so(tmp_path, shared_data, write_records, kind):
    folder = KINDS[kind](tmp_path / kind, shared_data)
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs("ab c").input_ids
    records = {"prompt": "ab c", "response": " d", "responses": [" d", " e"], "ranks": [0, 1], "text": "ab c"}
    path = write_records(records)
    assert load_prompts(path, tokenizer, 99)[0].tokens.tolist() == expected
    demonstration = load_demonstrations(path, tokenizer, 99, 99, 99)[0]
    assert demonstration.tokens[: demonstration.prompt_length].tolist() == expected
    comparison = load_comparisons(path, tokenizer, 99, 99, 99)[0]
    assert comparison.prompt_tokens.tolist() == expected
    build_indexed_dataset(["ab c", "ab c"], tokenizer, tmp_path / "corpus")
    documents = IndexedDataset(str(tmp_path / "corpus"))
    assert [document.tolist() for document in documents[:2]] == [[*expected, tokenizer.eos_id]] * 2
    ends = {demonstration.tokens[-1], *(response[-1] for response in comparison.responses_tokens)}
    assert ends == {tokenizer.end_id}


@pytest.mark.parametrize(
    ("template", "key", "warned"), [("$A", True, True), ("<s> $A", False, True), ("<s> $A", True, False)]
)
def test_where_files_contradict_each_other_transformers_decides(tmp_path, shared_data, caplog, template, key, warned):
    folder = sentencepiece(tmp_path / "t", shared_data, template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "add_bos_token": key})
    assert load_tokenizer(folder).encode("a", bos=True) == AutoTokenizer.from_pretrained(folder)("a").input_ids
    assert ("add_bos_token" in caplog.text) == warned


def test_a_tokenizer_that_ends_texts_itself_ends_no_prompt(tmp_path, shared_data):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "t", shared_data, "<s> $A </s>"))
    assert tokenizer.encode("Once", bos=True) == [1, *tokenizer.encode("Once")]


def test_a_cache_without_the_beginning_is_not_read_with_it(tmp_path, shared_data, write_records):
    path = write_records({"text": "the cat sat on the mat " * 20})
    for template, first in (("$A", None), ("<s> $A", 1)):
        folder = sentencepiece(tmp_path / f"tokenizer{first}", shared_data, template)
        data = load_pretraining(path, load_tokenizer(folder), 8, 4, 1, tmp_path / "cache")
        seen = np.concatenate([data.train[i].numpy() for i in range(len(data.train))])
        assert (1 in seen) == (first == 1)
        build_indexed_dataset(["the cat sat on the mat " * 20], load_tokenizer(folder), tmp_path / f"corpus{first}")
    with pytest.raises(UserError, match="made with another tokenizer"):
        load_pretraining(tmp_path / "corpusNone", load_tokenizer(tmp_path / "tokenizer1"), 8, 4, 1, tmp_path / "c")


def test_all_ends_of_all_files(tmp_path, shared_data):
    folder = sentencepiece(tmp_path / "t", shared_data)
    assert load_tokenizer(folder).stop_ids == (2,)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 426]})
    assert set(load_tokenizer(folder).stop_ids) == {2, 426}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "eos_token_id": [2, 411]})
    assert set(load_tokenizer(folder).stop_ids) == {2, 411, 426}
    write_json(folder / "config.json", {**config, "eos_token_id": 99999})  # the model has more rows than tokens
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).stop_ids == (2,)
    write_json(folder / "config.json", {**config, "eos_token_id": "</s>"})
    with pytest.raises(UserError, match=r"config\.json: eos_token_id must be a token id or a list of them, not '</s>'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_is_the_same_tokenizer(tmp_path, shared_data, kind):
    first = load_tokenizer(KINDS[kind](tmp_path / kind, shared_data))
    first.save(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.fingerprint == first.fingerprint
    assert (again.start_ids, again.eos_id, again.end_id) == (first.start_ids, first.eos_id, first.end_id)
    assert again.stop_ids == first.stop_ids
    assert theirs("a b").input_ids == first.encode("a b", bos=True)
    settings = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert settings.eos_token_id in (list(first.stop_ids), first.eos_id)
    assert settings.temperature == (0.6 if kind.startswith("llama3") else None)


def test_beginning_and_end_are_part_of_the_fingerprint(tmp_path, shared_data):
    folders = [
        sentencepiece(tmp_path / "a", shared_data),
        sentencepiece(tmp_path / "b", shared_data, "$A"),
        llama3(tmp_path / "c"),
        llama3(tmp_path / "d", chat_template=None),
    ]
    assert len({load_tokenizer(folder).fingerprint for folder in folders}) == 4


TEMPLATES = {
    "llama3": (tokenizer_folders.LLAMA3_CHAT, 259),
    "no_template": (None, 257),
    "without_an_end": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", 257),
    "end_of_text": ("{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}", 257),
    "refuses": ("{{ raise_exception('a system turn is needed') }}", 257),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_response_ends_as_the_chat_template_ends_an_answer(tmp_path, write_records, case):
    template, end = TEMPLATES[case]
    tokenizer = load_tokenizer(llama3(tmp_path / "t", template))
    assert (tokenizer.end_id, tokenizer.eos_id) == (end, 257)
    (item,) = load_demonstrations(write_records({"prompt": "a", "response": "b"}), tokenizer, 9, 9, 9)
    assert item.tokens.tolist() == [256, *tokenizer.encode("a"), *tokenizer.encode("b"), end]
    assert set(tokenizer.stop_ids) == {257, 259}


def test_an_end_that_only_the_model_names(tmp_path):
    folder = word_level(tmp_path / "t")
    with pytest.raises(UserError, match="no end-of-text token; set eos_token"):
        load_tokenizer(folder)
    write_json(folder / "config.json", {"eos_token_id": 3})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.pad_id) == (3, (3,), 0)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_padding_is_no_end(tmp_path):
    folder = word_level(tmp_path / "t", eos_token="end", pad_token="stop")
    assert load_tokenizer(folder).pad_id == 4
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 4, 0]})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, set(tokenizer.stop_ids)) == (1, {0, 3, 4})
