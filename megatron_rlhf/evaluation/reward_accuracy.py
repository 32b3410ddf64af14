"""How often a reward model prefers what people prefer: by K, by labelers, by confidence and by length."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.evaluation.estimates import Estimate, estimate

LENGTH_BINS = (
    (-1.0, -0.5, "preferred much shorter"),
    (-0.5, -0.1, "preferred shorter"),
    (-0.1, 0.1, "about as long"),
    (0.1, 0.5, "preferred longer"),
    (0.5, 1.0, "preferred much longer"),
)
"""Length of the preferred response less that of the other, over the longer of the two."""


@dataclass(frozen=True)
class Pair:
    """A strict preference and what the reward model thinks of it."""

    prompt: Hashable
    k: int
    """How many responses were ranked together."""
    margin: float
    """Score of the preferred response less that of the other."""
    longer: float
    """Relative difference of their lengths, as in LENGTH_BINS."""
    group: str
    """The team of the labeler, or the subset of a benchmark."""

    @property
    def correct(self) -> float:
        """1, 0, or a half where the scores are equal."""
        return 0.5 if self.margin == 0 else float(self.margin > 0)


def group_name(value: Any) -> str | None:
    """A group by its text; None where there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers in which some are missing
    return None if value is None else str(value) or None


def pairs_of(rows: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """All strict preferences of rankings that were scored: rows {"prompt", "ranks", "scores", "lengths", "group"}, as
    `evaluate.comparisons` writes them.

    Raises:
        UserError: There is none.
    """
    found = []
    for row in rows:
        for i, j in combinations(range(len(row["ranks"])), 2):
            if row["ranks"][i] == row["ranks"][j]:
                continue
            better, worse = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
            lengths = row["lengths"]
            longer = (lengths[better] - lengths[worse]) / max(lengths[better], lengths[worse], 1)
            margin = row["scores"][better] - row["scores"][worse]
            found.append(Pair(row["prompt"], len(row["ranks"]), margin, longer, row.get("group") or "all"))
    if not found:
        raise UserError(
            "no comparison in which one response is preferred; there is nothing to measure a reward model on"
        )
    return found


def accuracy(pairs: Sequence[Pair]) -> Estimate:
    """Percent of pairs on which the reward model agrees, over prompts."""
    return estimate([pair.correct for pair in pairs], [pair.prompt for pair in pairs], scale=100)


def accuracy_by(pairs: Sequence[Pair], key: Callable[[Pair], Any]) -> dict[Any, Estimate]:
    """`accuracy` for each value of `key`, in its order."""
    parts: dict[Any, list[Pair]] = {}
    for pair in pairs:
        parts.setdefault(key(pair), []).append(pair)
    return {name: accuracy(parts[name]) for name in sorted(parts)}


def by_length(pairs: Sequence[Pair]) -> dict[str, Estimate]:
    """`accuracy` by how much longer the preferred response is. A model that just likes length is right at the end of the
    table and wrong at its beginning."""
    found = {}
    for low, high, name in LENGTH_BINS:
        inside = [pair for pair in pairs if low <= pair.longer < high or (high == 1.0 and pair.longer == 1.0)]
        if inside:
            found[name] = accuracy(inside)
    return found


def prefers_longer(pairs: Sequence[Pair]) -> tuple[Estimate, Estimate] | None:
    """Percent of pairs of different length in which the longer response is preferred, by people and by the reward model; None
    where all are of the same."""
    different = [pair for pair in pairs if pair.longer != 0]
    if not different:
        return None
    prompts = [pair.prompt for pair in different]
    people = [float(pair.longer > 0) for pair in different]
    model = [0.5 if pair.margin == 0 else float((pair.margin > 0) == (pair.longer > 0)) for pair in different]
    return estimate(people, prompts, scale=100), estimate(model, prompts, scale=100)


@dataclass(frozen=True)
class Bin:
    """Pairs in which the reward model is about as sure of its choice."""

    confidence: float
    """Mean probability, in percent, that it gives to the response which it scores higher."""
    accuracy: Estimate


def calibration(pairs: Sequence[Pair], bins: int = 10) -> tuple[list[Bin], float]:
    """(bins of equal width from 50 to 100%, expected calibration error in percent points).

    The probability that a response is preferred is sigmoid(difference of scores), which the loss fits to people.
    """
    parts: dict[int, list[tuple[float, Pair]]] = {}
    for pair in pairs:
        confidence = 1 / (1 + math.exp(-min(abs(pair.margin), 700.0)))
        parts.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, pair))
    found, gap = [], 0.0
    for place in sorted(parts):
        inside = parts[place]
        mean = 100 * sum(confidence for confidence, _ in inside) / len(inside)
        found.append(Bin(mean, accuracy([pair for _, pair in inside])))
        gap += len(inside) / len(pairs) * abs(mean - found[-1].accuracy.mean)
    return found, gap
