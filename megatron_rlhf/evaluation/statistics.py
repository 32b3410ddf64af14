"""Figures that an evaluation reports, with their uncertainty: plain numbers in, plain numbers out."""

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

import numpy as np

RESAMPLES = 10_000


def win_rate(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(percent, standard error in percent) of prompts on which `a` scores higher than `b`; a tie counts half.

    Args:
        a, b: scores of two policies on the same prompts, in the same order.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} scores: a win rate needs two or more prompts, scored for both")
    _require_finite(a)
    _require_finite(b)
    wins = np.where(np.equal(a, b), 50.0, np.where(np.greater(a, b), 100.0, 0.0))
    return float(wins.mean()), float(wins.std(ddof=1) / math.sqrt(len(wins)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (0 of a single value)."""
    _require_finite(values)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread / math.sqrt(len(values))


def best_of_n_kl(n: int) -> float:
    """KL(best of n samples || one sample) in nats: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    It holds for any reward under which no two samples tie, and is an upper bound where some do.
    """
    if n < 1:
        raise ValueError(f"n = {n}: the best of one or more samples")
    return math.log(n) - (n - 1) / n


def bootstrap(
    values: Sequence[float], groups: Sequence[Hashable], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of `values`, by resampling whole groups with replacement.

    Values of one group (the comparisons of a prompt, the answers of a labeler) are not independent of each other, so
    resampling them one by one would give too narrow an interval.

    Args:
        groups: the group of each value.
        level: coverage probability of the interval.
    """
    if len(values) != len(groups) or not values:
        raise ValueError(
            f"{len(values)} values in {len(groups)} groups: give one group a value, and at least one value"
        )
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: between 0 and 1")
    _require_finite(values)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = [numbers[group] for group in groups]
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, 1000):  # bounds the memory for many groups
        drawn = generator.integers(len(sums), size=(min(1000, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pairwise_agreement(rankings: Sequence[Sequence[float]]) -> float:
    """Percent of pairs of items on which two labelers agree, over all pairs of labelers; NaN where nothing is compared.

    Two labelers agree on a pair of items if both prefer the same one, or both call them equal.

    Args:
        rankings: one list per labeler, the ranks that it gave to the same items (0 = best, equal = tie).
    """
    agreed, compared = count_agreements(rankings)
    return 100 * agreed / compared if compared else math.nan


def count_agreements(rankings: Sequence[Sequence[float]]) -> tuple[int, int]:
    """(agreements, comparisons) behind `pairwise_agreement`: to be summed over prompts."""
    if len({len(ranks) for ranks in rankings}) > 1:
        raise ValueError(f"rankings of {sorted({len(ranks) for ranks in rankings})} items: all must rank the same ones")
    agreed = compared = 0
    for one, other in combinations(rankings, 2):
        for i, j in combinations(range(len(one)), 2):
            agreed += np.sign(one[i] - one[j]) == np.sign(other[i] - other[j])
            compared += 1
    return int(agreed), compared


def krippendorff_alpha(rankings: Sequence[Sequence[float | None]]) -> float:
    """Krippendorff's alpha for ordinal data: 1 is perfect agreement, 0 is chance level (Krippendorff 2011).

    alpha = 1 - observed / expected disagreement, where values c < k of which there are n_c, ..., n_k differ by
    (n_c + ... + n_k - (n_c + n_k) / 2)^2. NaN where no item has two ranks, or all ranks are the same.

    Args:
        rankings: one list per labeler, the rank of each item; None where the labeler gave none.
    """
    if len({len(ranks) for ranks in rankings}) > 1:
        raise ValueError(
            f"rankings of {sorted({len(ranks) for ranks in rankings})} items: all must be of the same ones"
        )
    units = [[rank for rank in unit if rank is not None] for unit in zip(*rankings, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    levels = sorted({rank for unit in units for rank in unit})
    if len(levels) < 2:
        return math.nan
    place = {rank: i for i, rank in enumerate(levels)}
    coincidences = np.zeros((len(levels), len(levels)))
    for unit in units:
        for one, other in _ordered_pairs([place[rank] for rank in unit]):
            coincidences[one, other] += 1 / (len(unit) - 1)
    totals = coincidences.sum(axis=1)
    below = np.cumsum(totals) - totals / 2  # number of values up to the middle of this one's
    distances = (below[:, None] - below[None, :]) ** 2
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / expected)


def _ordered_pairs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    for i, one in enumerate(values):
        yield from ((one, other) for j, other in enumerate(values) if i != j)


def _require_finite(values: Sequence[float]) -> None:
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise ValueError(f"value {bad[0]} is {values[bad[0]]}: scores must be finite")
