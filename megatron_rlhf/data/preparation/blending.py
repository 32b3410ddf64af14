"""Several corpora in one, by weight."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import Tokens

Corpus = Callable[[], Iterable[Tokens]]
"""Gives a corpus's documents from the beginning."""


def blend(corpora: Sequence[Corpus], weights: Sequence[float], total: int | None, taken: list[int]) -> Iterator[Tokens]:
    """Documents of all corpora such that each has its share of the tokens, at every point as nearly as whole documents allow.

    Args:
        total: Tokens to reach, for which a corpus that ends is read again from its beginning; None: ends with the first corpus
            that does.
        taken: Is filled with the tokens of each corpus.

    Raises:
        UserError: a corpus without a document.
    """
    shares = [weight / sum(weights) for weight in weights]
    taken[:] = [0] * len(corpora)
    open_ones = [iter(corpus()) for corpus in corpora]
    begun = [False] * len(corpora)
    while total is None or sum(taken) < total:
        number = max(range(len(corpora)), key=lambda i: shares[i] * (sum(taken) + 1) - taken[i])
        document = next(open_ones[number], None)
        if document is None and not begun[number]:
            raise UserError(f"corpus {number + 1} of the blend has no text")
        if document is None and total is None:
            return
        if document is None:
            open_ones[number] = iter(corpora[number]())
            document = next(open_ones[number])
        begun[number] = True
        taken[number] += len(document)
        yield document


def parse_weights(sources: Sequence[str]) -> list[tuple[str, float]]:
    """`text.jsonl=0.7` for each; without a weight, 1. What is there under its whole name has none."""
    found = []
    for source in sources:
        name, equals, number = source.rpartition("=")
        if not equals or Path(source).exists():
            name, number = source, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise UserError(
                f"--input {source}: write SOURCE=WEIGHT with a weight of more than 0, such as {name or 'text.jsonl'}=0.7"
            )
        found.append((name, weight))
    if len({name for name, _ in found}) != len(found):
        raise UserError(f"a corpus is named twice: {', '.join(name for name, _ in found)}")
    return found
