"""A mean with its uncertainty, over values that come in groups."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlhf.evaluation.statistics import bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and its 95% interval, both over groups."""

    mean: float
    error: float
    """NaN for a single group."""
    low: float
    high: float
    count: int
    """Values, not groups."""


def estimate(values: Sequence[float], groups: Sequence[Hashable], scale: float = 1.0) -> Estimate:
    """The mean of `values` times `scale`; values of one group (the comparisons of a prompt) are not independent.

    The error is that of a ratio of sums over independent groups; the interval is `statistics.bootstrap`'s.
    """
    low, high = bootstrap(values, groups)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = [numbers[group] for group in groups]
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    mean = float(sums.sum() / counts.sum())
    error = math.nan
    if len(sums) > 1:
        residuals = sums - mean * counts
        error = math.sqrt(float((residuals**2).sum()) * len(sums) / (len(sums) - 1)) / counts.sum()
    return Estimate(scale * mean, scale * error, scale * low, scale * high, len(values))
