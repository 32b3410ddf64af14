"""Text to token ids and back, with any fast Hugging Face tokenizer or one trained on the user's own text."""

import datetime
import hashlib
import itertools
import json
import logging
import shutil
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
from megatron_rlhf.data import special_tokens
from megatron_rlhf.data.chat.files import replace_template
from megatron_rlhf.data.files import hub
from megatron_rlhf.data.special_tokens import GENERATION
from megatron_rlhf.data.streaming import StopWatch

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]
"""Token ids [t]: a ninth of the memory of a list of int."""

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a Hugging Face tokenizer may consist of."""
TEMPLATES = "additional_chat_templates"
"""A folder next to them: a model may have several templates."""


class Tokenizer:
    """A thin wrapper around a fast Hugging Face tokenizer (`.hf`) that adds tokens only when asked to.

    A prompt and its response are encoded one by one and joined, so that the border between them is a border between
    tokens. Tokenizers like Llama's put a space in front of every text; `continuation=True` leaves it out, for text that
    continues other text. So a response decodes to itself, leading space or not, with every tokenizer. Special tokens
    written out in a text are read as those tokens, as Hugging Face does.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, folder: Path | None = None):
        """`folder`: where it was loaded from. Raises `UserError` if no end-of-text token can be found."""
        ends = special_tokens.end_tokens(folder)
        special_tokens.name_end_of_text(hf, ends)
        vocabulary = hf.get_vocab()
        self.hf = hf
        self.folder = folder
        self._own_template = False
        self.known_as: frozenset[str] = frozenset()
        """Fingerprints before the chat template was replaced: models and texts of that time have the same ids."""
        self._whole = hf.backend_tokenizer
        self._whole.no_truncation()
        self._whole.no_padding()
        self._continuation = _without_leading_space(self._whole)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Largest id + 1: the rows that the model's embedding must have."""
        self.known_ids: tuple[int, ...] = tuple(sorted(set(vocabulary.values())))
        """Ids that stand for a token: a model may have more rows, and a vocabulary may have gaps."""
        self.start_ids: tuple[int, ...] = special_tokens.start_of_text(self._whole)
        """What the tokenizer itself puts before a text; empty if it adds nothing."""
        self.eos_id: int = hf.eos_token_id
        """Ends a document."""
        self.end_id: int = special_tokens.end_of_response(hf)
        """Ends a response: the chat template's end of an answer, if there is a template."""
        self.stop_ids: tuple[int, ...] = ()
        """The tokens that end a sampled response: every one that the folder names as an end, and `end_id`."""
        self.stop_texts: tuple[str, ...] = ()
        """Texts that also end a sampled response, however they are split into tokens."""
        self._add_stop_ids([self.eos_id, self.end_id, *ends])
        self.today: datetime.date | None = None
        """What chat templates that ask for the date are told; None: the date on which they are used."""
        self.bos_id: int | None = hf.bos_token_id
        """The beginning of text that the folder names, whether or not texts begin with it (`start_ids`)."""
        padding = hf.pad_token_id
        stops = self.stop_ids
        self.pad_id: int = (
            padding
            if padding is not None and padding not in stops
            else next(id for id in self.known_ids if id not in stops)
        )
        """Never an end token. Without a padding token, an ordinary one: padding is known from lengths, not ids."""

    def _add_stop_ids(self, ids: Iterable[int]) -> None:
        """Ids that this tokenizer does not have are left out: a model may name tokens that its tokenizer lacks."""
        known = (id for id in (*self.stop_ids, *ids) if 0 <= id < self.vocab_size)
        self.stop_ids = tuple(dict.fromkeys(known))

    def stop_also_at(self, texts: Iterable[str]) -> None:
        """What else ends a response: special tokens, by their text, and strings."""
        special = self.hf.added_tokens_encoder
        for text in texts:
            if not text:
                raise UserError("data.stop has an empty text, which every response would hold at once")
            if text in special:
                self._add_stop_ids([special[text]])
            else:
                self.stop_texts += (text,)

    def use_chat_template(self, template: str) -> None:
        """Another chat template than the folder's: it decides what ends a response, and is saved in its place."""
        self.known_as = self.known_as | {self.fingerprint}
        self.hf.chat_template = template
        self._own_template = True
        self.end_id = special_tokens.end_of_response(self.hf)
        self._add_stop_ids([self.end_id])
        self.__dict__.pop("fingerprint", None)

    @property
    def continuation(self) -> tokenizers.Tokenizer:
        """The backend for text that continues other text."""
        return self._continuation

    def stop_watch(self) -> StopWatch | None:
        """For one response; None if there are no such texts."""
        return self.watch_for(self.stop_texts)

    def watch_for(self, texts: Sequence[str]) -> StopWatch | None:
        """For one response, that ends at any of these texts; None if there are none."""
        return StopWatch(self._continuation, texts) if texts else None

    def encode(self, text: str, bos: bool = False, continuation: bool = False) -> list[int]:
        """Token ids of the text; `bos` begins it as the tokenizer itself begins a text (`start_ids`)."""
        return self.encode_batch([text], bos, continuation)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the text, and how many of its characters are read with each."""
        encoding = self._whole.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def encode_batch(self, texts: Sequence[str], bos: bool = False, continuation: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        start = list(self.start_ids) if bos else []
        backend = self._continuation if continuation else self._whole
        return [start + encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_stream(self, texts: Iterable[str], bos: bool = False, continuation: bool = False) -> Iterator[Tokens]:
        """`encode` of each text as an array, for more texts than fit in memory."""
        remaining = iter(texts)
        while chunk := list(itertools.islice(remaining, 1000)):
            for ids in self.encode_batch(chunk, bos, continuation):
                yield np.array(ids, dtype=np.int32)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """Each text as a document: begun as the tokenizer begins a text, and ended by the end of text."""
        return (np.append(ids, np.int32(self.eos_id)) for ids in self.encode_stream(texts, bos=True))

    def decode(self, ids: Iterable[int], continuation: bool = False, skip_special_tokens: bool = True) -> str:
        """The text of the ids (any iterable of integers, tensors included); `continuation` as in `encode`."""
        backend = self._continuation if continuation else self._whole
        return backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def take_stops(self, folder: Path) -> None:
        """Adds the end tokens that another folder names, that of a model with this tokenizer."""
        self._add_stop_ids(special_tokens.end_tokens(folder))

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face tokenizer folder that has all end tokens in its generation settings.

        Files that are complete as they are are copied, so that whatever could read them still can.
        """
        target = Path(path)
        settings = {}
        if self.folder is not None and (self.folder / "tokenizer.json").is_file():
            target.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, target / name)
            if (self.folder / TEMPLATES).is_dir():
                shutil.copytree(self.folder / TEMPLATES, target / TEMPLATES, copy_function=shutil.copyfile)
            if self._own_template:
                replace_template(target, self.hf.chat_template)
        else:
            self.hf.save_pretrained(str(target))
        if self.folder is not None and (self.folder / GENERATION).is_file():
            settings = special_tokens.read_object(self.folder / GENERATION)
        settings["eos_token_id"] = list(self.stop_ids) if len(self.stop_ids) > 1 else self.eos_id
        (target / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def agrees_with(self, fingerprint: str) -> bool:
        """Whether ids made with the tokenizer of this fingerprint mean the same texts."""
        return fingerprint == self.fingerprint or fingerprint in self.known_as

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that determines the ids of a text, its beginning and its end."""
        definition = json.loads(self._whole.to_str())
        parts = [definition[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        decides = [*parts, self.start_ids, self.eos_id, self.end_id]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face tokenizer folder, or that of a model's name on the hub.

    Raises:
        UserError: The folder does not exist, or has no fast tokenizer in it.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = hub.fetch(str(path), "data.tokenizer", hub.TOKENIZER_FILES) or folder
    if not folder.is_dir():
        raise UserError(f"{path}: no such tokenizer folder")
    # A tokenizer.json is unambiguous; AutoTokenizer would use the model type of a config.json next to it.
    loader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
    try:
        hf = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{path}: no fast tokenizer can be loaded from this folder (tokenizer.json): {error}"
        ) from error
    if not hf.is_fast:
        raise UserError(f"{path}: the folder holds no fast tokenizer; convert it so that it has a tokenizer.json")
    tokenizer = Tokenizer(hf, folder)
    special_tokens.warn_of_contradiction(folder / "tokenizer_config.json", begins=bool(tokenizer.start_ids))
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path) -> Tokenizer:
    """Trains a byte-level BPE on the texts and saves it to the folder `output`; the same texts give the same tokenizer.

    Ids: 0 is `<|pad|>`, 1 `<|endoftext|>`, then the 256 bytes, then the merges. A short text may give fewer than
    `vocab_size` tokens.

    Raises:
        UserError: `vocab_size` leaves no room for any merge.
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
    """The same tokenizer without the parts that put a space before a text and remove it when decoding."""

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
