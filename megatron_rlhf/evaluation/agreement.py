"""How far labelers agree: the paper's percent of pairs (72.6 +- 1.5%), and Krippendorff's alpha."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_rlhf.evaluation.statistics import count_agreements, krippendorff_alpha


@dataclass(frozen=True)
class Judgement:
    """What one labeler said about the outputs of one prompt."""

    prompt: int
    labeler: str
    ranks: Sequence[float]
    ratings: Sequence[float | None] = ()


@dataclass(frozen=True)
class Agreement:
    """Agreement within a set of labelers; NaN where nothing is compared."""

    percent: float
    """Pairs of outputs on which two labelers agree, ties included."""
    error: float
    """Standard error of it, over prompts."""
    alpha: float
    """Krippendorff's alpha of the ranks."""
    rating_alpha: float
    """Krippendorff's alpha of the ratings."""
    prompts: int
    """Prompts that two or more of them ranked."""
    comparisons: int
    """Pairs of outputs times pairs of labelers."""
    by_labeler: dict[str, tuple[float, int]]
    """Labeler -> percent agreement with the others, and comparisons."""


def agreement(judgements: Iterable[Judgement]) -> Agreement:
    """Agreement of labelers on the prompts that several of them ranked."""
    by_prompt: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        by_prompt.setdefault(judgement.prompt, []).append(judgement)
    shared = {prompt: found for prompt, found in by_prompt.items() if len(found) > 1}
    counts = [count_agreements([one.ranks for one in found]) for found in shared.values()]
    percent, error = _percent(counts)
    own: dict[str, list[tuple[int, int]]] = {}
    for found in shared.values():
        for one, other in combinations(found, 2):
            pair = count_agreements([one.ranks, other.ranks])
            own.setdefault(one.labeler, []).append(pair)
            own.setdefault(other.labeler, []).append(pair)
    return Agreement(
        percent=percent,
        error=error,
        alpha=_alpha({prompt: {one.labeler: one.ranks for one in found} for prompt, found in shared.items()}),
        rating_alpha=_alpha({prompt: {one.labeler: one.ratings for one in found} for prompt, found in shared.items()}),
        prompts=len(shared),
        comparisons=sum(compared for _, compared in counts),
        by_labeler={name: (_percent(own[name])[0], sum(compared for _, compared in own[name])) for name in sorted(own)},
    )


def _percent(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Agreed over compared, in percent, and its standard error as a ratio of sums over independent prompts."""
    agreed, compared = (np.array(column, dtype=float) for column in zip(*counts, strict=True)) if counts else (0.0, 0.0)
    total = float(np.sum(compared))
    if not total:
        return math.nan, math.nan
    share = float(np.sum(agreed)) / total
    if len(counts) < 2:
        return 100 * share, math.nan
    residuals = agreed - share * compared
    spread = math.sqrt(float(np.sum(residuals**2)) * len(counts) / (len(counts) - 1))
    return 100 * share, 100 * spread / total


def _alpha(prompts: dict[int, dict[str, Sequence[float | None]]]) -> float:
    """One row a labeler over all outputs of all prompts."""
    labelers = sorted({labeler for values in prompts.values() for labeler in values})
    rows: dict[str, list[float | None]] = {labeler: [] for labeler in labelers}
    for values in prompts.values():
        width = max(map(len, values.values()))
        for labeler in labelers:
            given = values.get(labeler) or [None] * width
            rows[labeler] += given
    return krippendorff_alpha(list(rows.values()))
