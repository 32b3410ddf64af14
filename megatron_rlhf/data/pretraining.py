"""Pretraining text for the ptx mix, in Megatron's own format: token files (.bin, .idx) read by its GPTDataset."""

import hashlib
import json
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.text_files import END_OF_DOCUMENT, Progress
from megatron_rlhf.data.records import Columns, read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens

with warnings.catch_warnings():  # data needs none of the accelerators whose absence Megatron warns about
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

PROBE_TOKENS = 2**20
"""This many tokens at the start of a token file made elsewhere are checked against the tokenizer."""


class TokenSequences:
    """Shuffled sequences of text, documents packed one after the other, each ended by the end-of-text token."""

    def __init__(self, dataset: GPTDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        """At least the requested number of sequences."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Long tensor [sequence_length + 1]: inputs are all but the last token, labels all but the first."""
        item = self._dataset[index]
        return torch.cat([item["tokens"], item["labels"][-1:]])


@dataclass(frozen=True)
class PretrainingData:
    """Training and held-out sequences of one corpus, which have no document in common."""

    train: TokenSequences
    held_out: TokenSequences | None
    describes: Mapping[str, int | str]
    """What distinguishes this text from another one, for the same tokenizer."""


@dataclass(frozen=True)
class CorpusSize:
    """What a tokenised corpus contains."""

    documents: int
    tokens: int
    """With the beginning and the end of each document."""


def read_texts(source: str | Path, progress: Progress | None = None, columns: Columns = None) -> Iterator[str]:
    """The field `text` of each record that is not blank; see `read_records`, and `split_documents` for .txt files."""
    for record in read_records(source, columns, progress):
        text = record.text("text")
        if text.strip():
            yield text


def build_indexed_dataset(texts: Iterable[str], tokenizer: Tokenizer, output_prefix: str | Path) -> CorpusSize:
    """Tokenises texts into Megatron's `.bin` and `.idx`: one document per text, begun as the tokenizer begins a text,
    and ended by the end-of-text token.

    A third file, `.meta.json`, names the tokenizer, so that `load_pretraining` can refuse another one. The files appear
    under their names only when complete. Memory use does not grow with the corpus.

    Raises:
        UserError: There is no text, or the files cannot be written.
    """
    return write_documents(tokenizer.encode_documents(texts), tokenizer, output_prefix)


def write_documents(documents: Iterable[Tokens], tokenizer: Tokenizer, output_prefix: str | Path) -> CorpusSize:
    """`build_indexed_dataset` of documents that are tokens already, their ends included."""
    prefix = Path(output_prefix).expanduser()
    _writable_folder(prefix.parent)
    unfinished = f"{prefix}.{secrets.token_hex(4)}.unfinished"  # process ids repeat on other nodes
    builder = IndexedDatasetBuilder(f"{unfinished}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    try:
        tokens = 0
        for document in documents:
            builder.add_document(torch.from_numpy(document), [len(document)])
            tokens += len(document)
        size = CorpusSize(len(builder.document_indices) - 1, tokens)
        if not size.documents:
            raise UserError(f"{prefix}: no text to tokenise")
        builder.finalize(f"{unfinished}.idx")
        about = {"tokenizer": tokenizer.fingerprint, "documents": size.documents, "tokens": size.tokens}
        Path(f"{unfinished}.meta.json").write_text(json.dumps(about))
        for suffix in (".meta.json", ".bin", ".idx"):  # .idx last: once it exists, the corpus counts as complete
            os.replace(unfinished + suffix, f"{prefix}{suffix}")
    finally:
        builder.data_file.close()
        for suffix in (".meta.json", ".bin", ".idx"):
            Path(unfinished + suffix).unlink(missing_ok=True)
    return size


def load_pretraining(
    source: str | Path,
    tokenizer: Tokenizer,
    sequence_length: int,
    samples: int,
    seed: int,
    cache_dir: str | Path,
    held_out_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
    on_one_rank: Callable[[Callable[[], None]], object] = lambda work: work(),
    progress: Progress | None = None,
) -> PretrainingData:
    """Makes at least `samples` training sequences and one epoch of held-out ones. Every rank of the world calls it.

    Args:
        source: The prefix of `.bin` and `.idx` files, or text (see `read_texts`), which is tokenised into `cache_dir`
            the first time and found there later.
        samples: Training sequences the run will ask for; a small corpus is repeated, each epoch in a different order.
        seed: Seed for the order of documents and of sequences.
        cache_dir: For tokenised text and Megatron's indices; all ranks must see the same folder.
        held_out_fraction: The share of tokens, in whole documents from the corpus's end, never trained on; if positive,
            at least one sequence. With 0 there is no held-out part.
        columns: How to make `text` of other columns, as in `read_records`.
        on_one_rank: Has one rank of several call what it is given, and raises its UserError on all.
        progress: Called with the bytes of text that are read, as in `read_records`.

    Raises:
        UserError: A mistake in the source, a corpus smaller than a sequence, tokens of another tokenizer, or a
            `cache_dir` that cannot be written.
    """
    assert samples > 0, samples
    assert 0 <= held_out_fraction < 1, held_out_fraction
    cache = _writable_folder(cache_dir)
    prefix = _tokenised_prefix(source, tokenizer, cache, columns)

    def tokenise() -> None:
        _require_plain_indices(cache / "indices")
        if not IndexedDataset.exists(str(prefix)):
            build_indexed_dataset(read_texts(source, progress, columns), tokenizer, prefix)

    on_one_rank(tokenise)
    if not IndexedDataset.exists(str(prefix)):
        raise UserError(
            f"{source}: not tokenised into {cache}, as this rank sees that folder: all ranks must see the same"
        )
    lengths = _document_lengths(prefix, tokenizer)
    held_out = _held_out_documents(lengths, held_out_fraction, sequence_length)
    _require_enough(source, lengths, held_out, sequence_length)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split=f"{len(lengths) - held_out},{held_out},0",  # counts of documents: Megatron accepts any proportions
        path_to_cache=str(cache / "indices"),
        tokenizer=_TokenizerStandIn(tokenizer, prefix),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, config).build()
    return PretrainingData(TokenSequences(train), TokenSequences(valid) if held_out else None, _describe(lengths))


def _require_enough(source: str | Path, lengths: npt.NDArray[np.int32], held_out: int, sequence_length: int) -> None:
    """Documents that are not held out make a training sequence, or UserError."""
    trained = int(lengths[: len(lengths) - held_out].sum())
    if trained < sequence_length + 1:
        enough = lengths.sum() >= 2 * (sequence_length + 1)
        cure = (
            f"whole documents are held out: give more of them, in a .txt file with a line {END_OF_DOCUMENT} between two"
            if held_out and enough
            else "give more text or a shorter sequence"
        )
        raise UserError(
            f"{source}: {trained} tokens to train on ({int(lengths.sum())} in {len(lengths)} documents, {held_out} of "
            f"them held out), less than one sequence of {sequence_length} + 1; {cure}"
        )


def _require_plain_indices(folder: Path) -> None:
    """Megatron reads indices that it finds in its cache as pickles if they are not plain arrays."""
    for path in sorted(folder.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path}: not an index of pretraining text ({error}); delete the folder {folder}, it is made anew"
            ) from error


def _describe(lengths: npt.NDArray[np.int32]) -> dict[str, int | str]:
    checksum = zlib.crc32(np.ascontiguousarray(lengths).tobytes())
    return {"documents": len(lengths), "tokens": int(lengths.sum()), "lengths": f"{checksum:08x}"}


class _TokenizerStandIn:
    """What GPTDataset needs of a tokenizer. It names no padding token: Megatron would remove those tokens from the text."""

    def __init__(self, tokenizer: Tokenizer, prefix: Path):
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eos_id
        # Part of the name of the cached indices, so that they are rebuilt when the token files are.
        self.unique_identifiers = {"corpus": _stamp(Path(f"{prefix}.idx")) + _stamp(Path(f"{prefix}.bin"))}


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns} "


def _writable_folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{folder}: this folder cannot be written to")
    return path


def _tokenised_prefix(source: str | Path, tokenizer: Tokenizer, cache: Path, columns: Mapping[str, str] | None) -> Path:
    """Where the source's token files are, or will be. Names in the cache change with the text and the tokenizer."""
    path = Path(source).expanduser()
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if IndexedDataset.exists(str(prefix)):
        return prefix
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{source}: both {prefix.name}.bin and {prefix.name}.idx are needed; one of them is missing")
    identity = (_stamp(path) if path.exists() else str(source)) + tokenizer.fingerprint
    identity += json.dumps(columns, sort_keys=True) if columns else ""
    return cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _document_lengths(prefix: Path, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Tokens of each document, after checking, as far as possible, that they are this tokenizer's."""
    advice = "make it anew with megatron-rlhf prepare pretraining and this run's tokenizer"
    about = Path(f"{prefix}.meta.json")
    try:
        made_with = json.loads(about.read_text())["tokenizer"] if about.exists() else tokenizer.fingerprint
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{about}: does not name a tokenizer ({error!r:.80}); {advice}") from error
    if not tokenizer.agrees_with(made_with):
        raise UserError(f"{prefix}: was made with another tokenizer than this run's; {advice}")
    try:
        corpus = IndexedDataset(str(prefix))
        lengths = corpus.sequence_lengths.copy()  # the original is in a file that is unmapped with `corpus`
        _require_inside(corpus, Path(f"{prefix}.bin"))
        head = max(1, int(np.searchsorted(np.cumsum(lengths), PROBE_TOKENS)))
        largest = max((int(ids.max()) for ids in corpus[:head] if len(ids)), default=0)
    except (AssertionError, ValueError, IndexError, OSError, struct.error) as error:
        raise UserError(f"{prefix}: not a Megatron .bin and .idx, or broken ({error}); {advice}") from error
    if largest >= tokenizer.vocab_size:
        raise UserError(f"{prefix}: holds token {largest}, the tokenizer has {tokenizer.vocab_size}; {advice}")
    return lengths


def _require_inside(corpus: IndexedDataset, tokens: Path) -> None:
    """Raise ValueError where the index names tokens that its file does not have: training would meet them days later."""
    index = corpus.index
    ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * index.dtype_size
    documents = index.document_indices
    outside = (index.sequence_lengths < 0) | (index.sequence_pointers < 0) | (ends > tokens.stat().st_size)
    if outside.any():
        raise ValueError(f"document {int(outside.argmax())} is not inside of {tokens.name}")
    if documents[0] != 0 or (np.diff(documents) < 0).any():
        raise ValueError("its documents are not in order")


def _held_out_documents(lengths: npt.NDArray[np.int32], fraction: float, sequence_length: int) -> int:
    """How many documents at the end hold the fraction of all tokens, and at least one sequence."""
    if not fraction:
        return 0
    from_end = np.cumsum(lengths[::-1], dtype=np.int64)
    wanted = max(fraction * from_end[-1], sequence_length + 1)
    return min(int(np.searchsorted(from_end, wanted)) + 1, len(lengths))
