"""Stories as token files: separate documents, each beginning as in the model's own training text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_rlhf.data.tokenizer import Tokenizer

OPENING = re.compile(r"Once\b|Long ago\b|A long time ago\b|There once\b|In a (small|big|far|little|quiet)\b")
PERHAPS = re.compile(r"One day\b|One \w+( \w+)? (day|morning|night|evening)\b")
"""Opens a story, or the second paragraph of one that was opened by "Once upon a time"."""


def split_stories(text: str) -> list[str]:
    """The stories of a text without separators."""
    stories: list[list[str]] = []
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        is_second = bool(stories) and len(stories[-1]) == 1
        if not stories or OPENING.match(paragraph) or (PERHAPS.match(paragraph) and not is_second):
            stories.append([])
        stories[-1].append(paragraph)
    return ["\n\n".join(paragraphs) for paragraphs in stories]


def write_stories(text: str, tokenizer: Tokenizer, context: int, prefix: Path) -> None:
    """Each story after a beginning-of-text token, the only separator: the model has never seen an end of text."""
    assert tokenizer.bos_id is not None, "a tokenizer without a beginning of text"
    stories = [[tokenizer.bos_id, *tokenizer.encode(story)] for story in split_stories(text)]
    write_documents(rows_of(stories, context), tokenizer, prefix)


def rows_of(stories: Sequence[Sequence[int]], length: int) -> Iterator[list[int]]:
    """Rows of `length` tokens, each beginning where a story begins, as in the model's training; a story that the end of a row
    cuts short begins the next row, unless it is longer than a row."""
    first = 0
    while first < len(stories):
        row, last = [*stories[first]], first
        while len(row) < length and last + 1 < len(stories):
            last += 1
            row += stories[last]
        if len(row) >= length:
            yield row[:length]
        is_whole = len(row) <= length or last == first
        first = last + 1 if is_whole else last


def write_documents(documents: Iterable[Sequence[int]], tokenizer: Tokenizer, prefix: Path) -> None:
    """Megatron's `.bin` and `.idx`."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
