"""The tokens that both models of a conversion run on, and the rows of a large vocabulary that these need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.conversion.whole_tensors import row_pieces
from megatron_rlhf.parallel import collectives

SAMPLE_TEXT = (
    "Once upon a time there was a girl who asked a machine for help. It answered as well as it could, said what it did "
    "not know, and did no harm. 1 + 1 = 2; (a, b) -> [b, a]."
)
PIECE_BYTES = 2**27
"""Maximum bytes of an embedding or unembedding in fp32 to hold in memory at a time."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on one side; the first row is the longest."""

    tokens_bs: Tensor
    real_bs: Tensor
    """bool: not padding."""
    left: bool

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], left: bool) -> "Batch":
        """Pad rows to the longest."""
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(len(row))
            tokens[i, where], real[i, where] = torch.tensor(row), True
        return cls(tokens.to(collectives.device()), real.to(collectives.device()), left)

    @property
    def positions_bs(self) -> Tensor:
        """Of every real token, counted without padding."""
        return (self.real_bs.cumsum(1) - 1).clamp(min=0)


def vocabulary_pieces(model: ModelConfig) -> list[slice]:
    """The rows of an embedding, in pieces small enough to hold in memory."""
    return row_pieces((model.vocab_size,), model.hidden_size * 4, PIECE_BYTES)


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a large vocabulary that fit into a model with a small one."""

    tokens: Tensor
    """Those that occur, ascending; in a model of `rows` rows they are 0, 1, ..."""
    pieces: list[slice]
    """All rows, in pieces of at most `rows`."""

    @classmethod
    def of(cls, model: ModelConfig, batches: Sequence[Batch]) -> "Vocabulary":
        """For models that run on these batches."""
        tokens = torch.cat([batch.tokens_bs.flatten() for batch in batches]).unique()
        return cls(tokens, vocabulary_pieces(model))

    @property
    def rows(self) -> int:
        """Rows of the small embedding."""
        return max(len(self.tokens), self.pieces[0].stop)

    def ids(self, batch: Batch) -> Tensor:
        """The batch's tokens, by their rows in the small embedding."""
        return torch.searchsorted(self.tokens, batch.tokens_bs)

    def fill(self, embedding: Tensor, read: Callable[[slice], Tensor]) -> None:
        """Put the rows of the tokens that occur into the small embedding; `read` gives rows of the whole one."""
        for piece in self.pieces:
            inside = (self.tokens >= piece.start) & (self.tokens < piece.stop)
            if inside.any():
                embedding[: len(self.tokens)][inside] = read(piece).to(embedding)[self.tokens[inside] - piece.start]


def sample_rows(model: ModelConfig, text: Sequence[int], length: int) -> list[list[int]]:
    """Random tokens over the whole length, a text, and a shorter row of random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.max_sequence_length)
    rows = [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in (length, max(length // 3, 1))]
    return [rows[0], *([list(text[:length])] if text else []), rows[1]]


def check_batches(model: ModelConfig, text: Sequence[int], length: int) -> list[Batch]:
    """A row of full length, then shorter ones padded to each other; each as in training and as in sampling."""
    longest, *shorter = sample_rows(model, text, length)
    return [Batch.of(rows, left) for rows in ([longest], shorter) for left in (False, True)]
