"""Numbers for drawing: a metric over the steps, smoothed and thinned, and the ticks beside it. No drawing here."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

MAX_POINTS = 500
"""Points drawn per line: finer than the pixels of a small chart, and few enough to keep a report under a megabyte."""
SMOOTHING_FRACTION = 0.04
MIN_POINTS_TO_SMOOTH = 20


@dataclass(frozen=True)
class Curve:
    """Values of one metric at the steps that have one."""

    steps: list[float]
    values: list[float]
    not_finite: list[float]
    """Steps at which the value was NaN or infinite."""

    def __bool__(self) -> bool:
        return bool(self.steps or self.not_finite)


def curve(records: Iterable[Mapping[str, Any]], metric: str, scale: float = 1.0) -> Curve:
    """The values of `metric`, times `scale`, from the records of a run."""
    found = [(record["step"], record[metric]) for record in records if metric in record]
    finite = [(step, value * scale) for step, value in found if value is not None]
    return Curve([s for s, _ in finite], [v for _, v in finite], [s for s, v in found if v is None])


def is_noisy(values: Sequence[float]) -> bool:
    """Whether smoothing helps: there are many values, and their total variation is more than four times their range."""
    if len(values) < MIN_POINTS_TO_SMOOTH:
        return False
    path = sum(abs(b - a) for a, b in pairwise(values))
    return path > 4 * (max(values) - min(values))


def smooth(values: Sequence[float]) -> list[float]:
    """A local linear fit around each value, with bell-shaped weights that span some 4% of the values.

    Unlike an exponential moving average it does not lag behind a trend, and unlike a plain kernel it does not flatten
    it at the ends.
    """
    y = np.asarray(values, dtype=float)
    width = max(1.5, SMOOTHING_FRACTION * len(y) / 2)
    offsets = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    bell = np.exp(-0.5 * (offsets / width) ** 2)

    def weighted(signal: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.convolve(signal, weights)[len(offsets) // 2 :][: len(y)]

    s0, s1, s2 = (weighted(np.ones_like(y), bell * offsets**power) for power in range(3))
    t0, t1 = (weighted(y, bell * offsets**power) for power in range(2))
    # A steep line may leave the range of the values, where a logarithmic axis cannot follow.
    return ((s2 * t0 - s1 * t1) / (s0 * s2 - s1 * s1)).clip(y.min(), y.max()).tolist()


def thin(values: Sequence[float]) -> list[int]:
    """Indices of some MAX_POINTS values to draw: the minimum and maximum of each stretch, so that spikes stay."""
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    stretch = math.ceil(2 * len(values) / MAX_POINTS)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        indices = range(start, min(start + stretch, len(values)))
        kept |= {min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)}
    return sorted(kept)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`, approximately `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = power * next(
        factor for factor, limit in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10)) if rough / power <= limit
    )
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [round(index * spacing, 12 - math.floor(math.log10(spacing))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """About five powers of ten between `low` and `high`; with their multiples by 2 and 5 where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 5)))
    return [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Labels that distinguish neighbouring ticks, with one suffix for all: 0.9998 and 1.0000, or 10k and 20k."""
    if not values:
        return []
    factor, suffix = _unit_for(max(abs(value) for value in values))
    spacing = min((abs(b - a) for a, b in pairwise(values)), default=abs(values[0]) or 1.0)
    decimals = max(0, -math.floor(math.log10(spacing / factor) + 1e-9))
    return [f"{value / factor:.{decimals}f}{suffix}" if value else "0" for value in values]


def format_value(value: float, digits: int = 4) -> str:
    """A number as people write it: 0.5312, 12.35k, 2.5e-6."""
    if not abs(value) <= sys.float_info.max:  # an int may be larger
        return str(value)
    factor, suffix = _unit_for(abs(value))
    scaled = value / factor
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled)))) if scaled else 0
    text = f"{scaled:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix


def format_measured(value: float, error: float) -> str:
    """A mean and its standard error, both with the decimals needed for the error's first two digits."""
    decimals = max(0, 1 - math.floor(math.log10(error))) if 0 < error < math.inf else 3
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _unit_for(size: float) -> tuple[float, str]:
    """Divisor and suffix that bring a number of this size near one."""
    for factor, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return (1e3 if suffix == "k" else factor), suffix
    if 0 < size < 1e-3:
        power = math.floor(math.log10(size) + 1e-9)
        return 10.0**power, f"e{power}"
    return 1.0, ""
