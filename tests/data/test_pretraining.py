"""Pretraining text: token files made and read, sequences that equal the text, held-out documents, many ranks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.pretraining import build_indexed_dataset, load_pretraining, read_texts
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"document {i}: " + "xyz " * (i % 7) for i in range(40)]


def load(source, tokenizer, cache_dir, **changes):
    arguments = {"sequence_length": 16, "samples": 20, "seed": 1, "cache_dir": cache_dir} | changes
    return load_pretraining(source, tokenizer, **arguments)


def all_tokens(sequences, count):
    return [sequences[i].tolist() for i in range(count)]


def test_token_files_hold_each_text_and_its_end(tokenizer, tmp_path):
    size = build_indexed_dataset(TEXTS, tokenizer, tmp_path / "new" / "corpus")
    corpus = IndexedDataset(str(tmp_path / "new" / "corpus"))
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert [corpus[i].tolist() for i in range(len(corpus))] == expected
    assert corpus.document_indices.tolist() == list(range(41))
    assert (size.documents, size.tokens) == (40, sum(map(len, expected)))
    assert corpus.index.dtype == np.uint16
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.meta.json",
    ]


def test_token_files_are_deterministic(tokenizer, tmp_path):
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "a")
    build_indexed_dataset(iter(TEXTS), tokenizer, tmp_path / "b")
    for suffix in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_interrupted_build_leaves_nothing_behind(tokenizer, tmp_path):
    def texts():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_indexed_dataset(texts(), tokenizer, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no text to tokenise"):
        build_indexed_dataset([], tokenizer, tmp_path / "a")


def test_one_document_comes_back_as_its_windows(tokenizer, tmp_path):
    ids = [*tokenizer.encode(" ".join(map(str, range(100)))), tokenizer.eos_id]
    build_indexed_dataset([" ".join(map(str, range(100)))], tokenizer, tmp_path / "corpus")
    windows = [ids[start : start + 17] for start in range(0, len(ids) - 16, 16)]
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", samples=len(windows))
    assert data.held_out is None
    assert data.train[0].dtype == torch.long
    sequences = all_tokens(data.train, len(data.train))
    assert sequences != windows  # shuffled
    assert sorted(sequences) == sorted(windows)


def test_documents_are_packed_whole(tokenizer, tmp_path):
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", sequence_length=100)
    found = set()
    for sequence in all_tokens(data.train, len(data.train)):
        assert len(sequence) == 101
        found.update(tokenizer.decode(sequence, skip_special_tokens=False).split("<|endoftext|>")[1:-1])
    assert found <= set(TEXTS)
    assert len(found) > 20


def test_padding_tokens_in_the_text_are_kept(tokenizer, tmp_path):
    """Megatron would turn its tokenizer's padding into token 0 and exclude it from the loss."""
    build_indexed_dataset(["a<|pad|>" * 20], tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", sequence_length=8, samples=1)
    assert sorted(set(data.train[0].tolist())) == sorted({tokenizer.pad_id, *tokenizer.encode("a")})


def test_small_corpus_is_repeated_in_another_order(tokenizer, tmp_path):
    build_indexed_dataset(TEXTS[:4], tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", samples=500)
    assert len(data.train) >= 500
    assert len({tuple(sequence) for sequence in all_tokens(data.train, 500)}) > 20


def test_order_depends_on_the_seed_alone(tokenizer, tmp_path):
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "corpus")
    first, again, other = (
        all_tokens(load(tmp_path / "corpus", tokenizer, tmp_path / cache, seed=seed).train, 20)
        for cache, seed in [("a", 1), ("b", 1), ("a", 2)]
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5])
def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path, fraction):
    texts = [chr(ord("A") + i) * 30 for i in range(26)]  # each document is identified by its letter
    build_indexed_dataset(texts, tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", samples=200, held_out_fraction=fraction)
    trained, held_out = (
        set("".join(tokenizer.decode(part[i]) for i in range(len(part)))) for part in (data.train, data.held_out)
    )
    assert not trained & held_out
    assert len(data.held_out) >= 1
    assert len(held_out) == pytest.approx(max(1, 26 * fraction), abs=1)
    assert len(trained | held_out) == 26


@pytest.mark.parametrize(("fraction", "letters"), [(0.001, "EF"), (0.1, "DEF")])
def test_held_out_share_is_of_tokens_and_a_sequence_at_least(tokenizer, tmp_path, fraction, letters):
    build_indexed_dataset(["A" * 200, *(letter * 10 for letter in "BCDEF")], tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache", samples=50, held_out_fraction=fraction)
    held_out = "".join(tokenizer.decode(data.held_out[i]) for i in range(len(data.held_out)))
    trained = "".join(tokenizer.decode(data.train[i]) for i in range(50))
    assert set(held_out) <= set(letters)
    assert set(trained) == set("ABCDEF") - set(letters)


def test_text_is_tokenised_once_into_the_cache(tokenizer, tmp_path, write_records, monkeypatch):
    path = write_records(*({"text": text} for text in [*TEXTS, " "]))
    first = all_tokens(load(path, tokenizer, tmp_path / "cache").train, 20)
    monkeypatch.setattr("megatron_rlhf.data.pretraining.build_indexed_dataset", None)
    assert all_tokens(load(path, tokenizer, tmp_path / "cache").train, 20) == first
    (index,) = (tmp_path / "cache").glob("*.idx")
    assert len(IndexedDataset(str(index.with_suffix("")))) == len(TEXTS)  # the blank text is left out


def test_changed_text_or_tokenizer_is_tokenised_anew(tokenizer, tmp_path, write_records):
    cache = tmp_path / "cache"
    load(write_records({"text": "a" * 40}), tokenizer, cache)
    path = write_records({"text": "b" * 41})
    assert set(tokenizer.decode(load(path, tokenizer, cache).train[0])) == {"b"}
    other = train_tokenizer(["bb bb bbb"], 262, tmp_path / "other")
    assert other.decode(load(path, other, cache, sequence_length=4).train[0]).startswith("b")
    assert len(list(cache.glob("*.idx"))) == 3


def test_rebuilt_token_files_are_not_read_with_the_old_indices(tokenizer, tmp_path):
    build_indexed_dataset(["a" * 400], tokenizer, tmp_path / "corpus")
    load(tmp_path / "corpus", tokenizer, tmp_path / "cache")
    build_indexed_dataset(["b" * 60], tokenizer, tmp_path / "corpus")
    data = load(tmp_path / "corpus", tokenizer, tmp_path / "cache")
    assert set("".join(tokenizer.decode(data.train[i]) for i in range(20))) == {"b"}


def test_suffixes_name_the_same_corpus(tokenizer, tmp_path):
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "corpus")
    for suffix in (".bin", ".idx"):
        assert len(load(tmp_path / f"corpus{suffix}", tokenizer, tmp_path / "cache").train) >= 20
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(UserError, match=r"both corpus.bin and corpus.idx are needed"):
        load(tmp_path / "corpus.idx", tokenizer, tmp_path / "cache")


def test_mistakes(tokenizer, tmp_path, write_records):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"nowhere.txt: no such file"):
        load(tmp_path / "nowhere.txt", tokenizer, cache)
    with pytest.raises(UserError, match=r"records.jsonl, line 1: no column 'text'.*; there are: txt"):
        load(write_records({"txt": "a"}), tokenizer, cache)
    with pytest.raises(
        UserError, match=r"11 tokens to train on \(11 in 1 documents, 0 of them held out\), less than one"
    ):
        load(write_records({"text": "a123456789"}), tokenizer, cache)
    with pytest.raises(UserError, match=r"0 tokens to train on \(41 in 1 documents, 1 of them held out\)"):
        load(write_records({"text": "b123" * 10}), tokenizer, cache, held_out_fraction=0.1)
    with pytest.raises(
        UserError, match=r"whole documents are held out: give more of them, .* <\|endoftext\|> between two"
    ):
        load(write_records({"text": "c123" * 10}), tokenizer, cache, held_out_fraction=0.1)
    with pytest.raises(UserError, match=r"give more text or a shorter sequence"):
        load(write_records({"text": "d123" * 5}), tokenizer, cache, held_out_fraction=0.1)
    with pytest.raises(UserError, match=r"no text to tokenise"):
        load(write_records({"text": " "}), tokenizer, cache)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: this folder cannot be made"):
        load(write_records({"text": "a" * 99}), tokenizer, tmp_path / "file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Megatron closes what it did not open
def test_tokens_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    larger = train_tokenizer(["abc abc bcd bcd"], 266, tmp_path / "larger")
    build_indexed_dataset(["abc bcd " * 9], larger, tmp_path / "corpus")
    with pytest.raises(UserError, match="corpus: was made with another tokenizer"):
        load(tmp_path / "corpus", tokenizer, tmp_path / "cache")
    (tmp_path / "corpus.meta.json").unlink()  # as if made by Megatron's own tool
    with pytest.raises(UserError, match=r"corpus: holds token 26\d, the tokenizer has 259"):
        load(tmp_path / "corpus", tokenizer, tmp_path / "cache")
    (tmp_path / "corpus.idx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"corpus: not a Megatron .bin and .idx"):
        load(tmp_path / "corpus", tokenizer, tmp_path / "cache")


def test_a_rank_that_sees_another_folder_is_told(tokenizer, tmp_path, write_records):
    path, read = write_records({"text": "a" * 99}), []
    with pytest.raises(UserError, match=r"not tokenised into .*: all ranks must see the same"):
        load(path, tokenizer, tmp_path / "c", on_one_rank=lambda work: None)
    load(path, tokenizer, tmp_path / "c", progress=read.append)
    assert sum(read) == path.stat().st_size


RANK = """
import sys
import torch.distributed as dist
from megatron_rlhf.parallel.collectives import on_first_rank
from megatron_rlhf.data.pretraining import load_pretraining
from megatron_rlhf.data.tokenizer import load_tokenizer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
data = load_pretraining(
    f"{folder}/records.jsonl", load_tokenizer(f"{folder}/tokenizer"), sequence_length=16, samples=20, seed=1,
    cache_dir=f"{folder}/cache", held_out_fraction=0.2, on_one_rank=on_first_rank,
)
print([data.train[i].tolist() for i in range(20)], [data.held_out[i].tolist() for i in range(len(data.held_out))])
"""


def test_two_ranks_read_the_same(tokenizer, tmp_path, write_records):
    path = write_records(*({"text": text} for text in TEXTS))
    tokenizer.save(tmp_path / "tokenizer")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    data = load(path, tokenizer, tmp_path / "alone", held_out_fraction=0.2)
    alone = f"{all_tokens(data.train, 20)} {all_tokens(data.held_out, len(data.held_out))}\n"
    assert outputs == [alone, alone]


def test_real_text(shared_data, tmp_path, capfd):
    tokenizer = load_tokenizer(shared_data / "tinystories_260k")
    source = shared_data / "tinystories.txt"
    data = load(source, tokenizer, tmp_path, sequence_length=256, samples=300, held_out_fraction=0.05)
    text = source.read_text()
    assert "".join(read_texts(source)).replace("\n", "") == text.replace("\n", "")  # no character is lost
    first = tokenizer.decode(data.train[0], skip_special_tokens=False).split("</s>")[0]
    assert first[3:200] in text
    assert len(data.train) >= 300
    assert 16 <= len(data.held_out) <= 26  # 5% of about 90,000 tokens, rounded up to whole documents
    assert capfd.readouterr() == ("", "")


def test_text_of_other_columns(tokenizer, write_records, tmp_path):
    """And two templates of one file are two corpora."""
    path = write_records(*({"title": f"t{i}", "body": "abcdefgh" * 3} for i in range(9)))
    for template, begins in (("{title}: {body}", "t0: abc"), ("{body}", "abcdefgh")):
        data = load_pretraining(path, tokenizer, 8, 4, 1, tmp_path / "cache", columns={"text": template})
        del data
        assert next(read_texts(path, columns={"text": template})).startswith(begins)
    assert len(list((tmp_path / "cache").glob("*.idx"))) == 2
