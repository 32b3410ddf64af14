"""From the page's form to an answer, and back: labelers see letters, in an order of their own, and never a source."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlhf.labeling.questions import LETTERS, QUESTION_NAMES, RATINGS, SKIP_REASONS
from megatron_rlhf.labeling.types import Refused


class Form(Protocol):
    """A form that was sent."""

    def get(self, key: str) -> Any: ...
    def getlist(self, key: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Card:
    """One text as a labeler sees it: outputs that are the same text are read, and ranked, once."""

    letter: str
    text: str
    places: tuple[int, ...]
    """Which of the task's outputs these are."""


def cards(outputs: Sequence[str], seed: str) -> list[Card]:
    """The distinct outputs in an order that `seed` decides."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(outputs):
        places.setdefault(text, []).append(place)
    texts = list(places)
    random.Random(seed).shuffle(texts)
    return [Card(letter, text, tuple(places[text])) for letter, text in zip(LETTERS, texts, strict=False)]


def read_ranking(form: Form, shown: Sequence[Card]) -> dict[str, Any]:
    """{"ranks", "ratings", "metadata"}, a value for each output in the task's order, and "note". None: not answered yet.

    Raises:
        Refused: A value that the page does not offer.
    """
    size = sum(len(card.places) for card in shown)
    ranks: list[int | None] = [None] * size
    ratings: list[int | None] = [None] * size
    metadata: list[list[str]] = [[] for _ in range(size)]
    for card in shown:
        rank = _number(form, f"rank_{card.letter}", range(1, len(shown) + 1))
        rating = _number(form, f"rating_{card.letter}", RATINGS)
        ticked = [str(name) for name in form.getlist(f"is_{card.letter}")]
        wrong = set(ticked) - set(QUESTION_NAMES)
        if wrong:
            raise Refused(f"output {card.letter}: there is no question {sorted(wrong)}")
        for place in card.places:
            ranks[place], ratings[place] = rank, rating
            metadata[place] = [name for name in QUESTION_NAMES if name in ticked]
    return {"ranks": ranks, "ratings": ratings, "metadata": metadata, "note": _text(form, "note")}


def read_demonstration(form: Form) -> dict[str, Any]:
    """{"response"}."""
    return {"response": _text(form, "response")}


def read_skip(form: Form) -> dict[str, Any]:
    """{"reason", "note"}. Raises Refused for a reason that there is not."""
    reason = _text(form, "reason")
    if reason not in SKIP_REASONS:
        raise Refused("choose a reason for skipping this prompt")
    return {"reason": reason, "note": _text(form, "skip_note")}


def missing(content: dict[str, Any], shown: Sequence[Card], require_ratings: bool) -> str:
    """What an answer still lacks, in a sentence; empty if nothing."""
    if not shown:
        return "" if content["response"].strip() else "Write an answer first."
    unranked = [card.letter for card in shown if content["ranks"][card.places[0]] is None]
    if unranked:
        return f"Not ranked yet: {', '.join(unranked)}."
    unrated = [card.letter for card in shown if content["ratings"][card.places[0]] is None]
    return f"Not rated yet: {', '.join(unrated)}." if unrated and require_ratings else ""


def dense(ranks: Sequence[float]) -> list[int]:
    """Ranks from 0, without gaps: 1, 3, 3 becomes 0, 1, 1."""
    order = {rank: i for i, rank in enumerate(sorted(set(ranks)))}
    return [order[rank] for rank in ranks]


def _number(form: Form, name: str, allowed: range) -> int | None:
    value = _text(form, name)
    if not value:
        return None
    if value not in map(str, allowed):
        raise Refused(f"{name} = {value!r:.20}: {allowed[0]} to {allowed[-1]}")
    return int(value)


def _text(form: Form, name: str) -> str:
    value = form.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name}: text, not a file")
    # A browser sends line ends as CR LF.
    return (value or "").replace("\r\n", "\n")
