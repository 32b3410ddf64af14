"""Text to token ids and back, by any fast Hugging Face tokenizer or one trained on the user's own text."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError

Tokens = npt.NDArray[np.int32]
"""Token ids [t]: a ninth of the memory of a list of int."""

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""Where to look for the end of text when the folder's configuration does not name it (GPT-2's own files do not)."""


class Tokenizer:
    """A thin wrapper around a fast Hugging Face tokenizer (`.hf`) that adds no token on its own.

    A prompt and its response are encoded one by one and joined, so that the border between them is a border between
    tokens. Tokenizers of Llama's kind put a space in front of every text; `continuation=True` leaves it out, for text
    that goes on where other text stopped. So a response decodes to itself, leading space or not, with every tokenizer.
    Special tokens written out in a text are read as those tokens, as Hugging Face does.
    """

    def __init__(self, hf: PreTrainedTokenizerFast):
        """Raises `UserError` if no end-of-text token is to be found."""
        vocabulary = hf.get_vocab()
        if hf.eos_token is None:
            hf.eos_token = next((token for token in END_TOKENS if token in vocabulary), None)
        if hf.eos_token is None:
            raise UserError(
                f"{hf.name_or_path}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        self.hf = hf
        self._whole = hf.backend_tokenizer
        self._whole.no_truncation()
        self._whole.no_padding()
        self._continuation = _without_leading_space(self._whole)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Largest id + 1: the rows that the model's embedding must have."""
        self.eos_id: int = hf.eos_token_id
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        """The tokens that end a response."""
        self.bos_id: int | None = None if hf.bos_token_id == self.eos_id else hf.bos_token_id
        """None also where it is the end-of-text token, as in GPT-2, which was not trained to start with it."""
        padding = hf.pad_token_id
        self.pad_id: int = padding if padding not in (None, self.eos_id) else int(self.eos_id == 0)
        """Never the end of text. Without a padding token, an ordinary one: lengths tell padding, not ids."""

    def encode(self, text: str, bos: bool = False, continuation: bool = False) -> list[int]:
        """Token ids of the text; `bos` puts the beginning-of-text token first if the tokenizer has one."""
        return self.encode_batch([text], bos, continuation)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = False, continuation: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        backend = self._continuation if continuation else self._whole
        return [start + encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_stream(self, texts: Iterable[str], bos: bool = False, continuation: bool = False) -> Iterator[Tokens]:
        """`encode` of each text as an array, for more texts than fit in memory."""
        remaining = iter(texts)
        while chunk := list(itertools.islice(remaining, 1000)):
            for ids in self.encode_batch(chunk, bos, continuation):
                yield np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int], continuation: bool = False, skip_special_tokens: bool = True) -> str:
        """The text of the ids (any iterable of integers, tensors included); `continuation` as in `encode`."""
        backend = self._continuation if continuation else self._whole
        return backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face tokenizer folder."""
        self.hf.save_pretrained(str(path))

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of all that decides the ids of a text."""
        return hashlib.sha256(f"{self._whole.to_str()}{self.eos_id}".encode()).hexdigest()[:16]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face tokenizer folder.

    Raises:
        UserError: There is no such folder, or no fast tokenizer in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: no such tokenizer folder")
    # A tokenizer.json leaves nothing to guess; AutoTokenizer would go by the model type in a config.json beside it.
    loader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
    try:
        hf = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{path}: no fast tokenizer can be loaded from this folder (tokenizer.json): {error}"
        ) from error
    if not hf.is_fast:
        raise UserError(f"{path}: the folder holds no fast tokenizer; convert it so that it has a tokenizer.json")
    return Tokenizer(hf)


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path) -> Tokenizer:
    """Trains a byte-level BPE on the texts and saves it to the folder `output`; the same texts give the same tokenizer.

    Ids: 0 is `<|pad|>`, 1 `<|endoftext|>`, then the 256 bytes, then the merges. A short text may give fewer than
    `vocab_size` tokens.

    Raises:
        UserError: `vocab_size` leaves no room for a merge.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 3
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size={vocab_size}: must be at least {smallest}: 256 bytes, 2 special tokens and one merge"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING, END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING))
    tokenizer.save(output)
    return tokenizer


def require_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int, key: str) -> None:
    """Raises `UserError` if the tokenizer has ids for which a model with `vocab_size` (config key `key`) has no row."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{key}={vocab_size}: the tokenizer {tokenizer.hf.name_or_path} has {tokenizer.vocab_size} ids, more than "
            f"the model's vocabulary; set {key} to at least {tokenizer.vocab_size} or use the model's own tokenizer"
        )


def _without_leading_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, less the parts that put a space before a text and take it away when decoding."""

    def strip(part: Any) -> Any:
        if isinstance(part, list):
            kept = [strip(item) for item in part]
            return [item for item in kept if item is not None]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend" or (part.get("type") == "Strip" and part.get("content") == " "):
            return None
        never = {"prepend_scheme": "never", "add_prefix_space": False}  # of Metaspace and of ByteLevel
        return {key: never.get(key, strip(value)) for key, value in part.items()}

    definition = json.loads(backend.to_str())
    for stage in ("normalizer", "pre_tokenizer", "decoder"):
        definition[stage] = strip(definition[stage])
    return tokenizers.Tokenizer.from_str(json.dumps(definition))
