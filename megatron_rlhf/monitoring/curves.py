"""Numbers for drawing: a metric over the steps, smoothed and thinned, and the ticks beside it. No drawing here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 500
"""Points drawn of a line: finer than the pixels of a small chart, and what keeps a report under a megabyte."""
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
    """The values of `metric`, times `scale`, out of the records of a run."""
    found = [(record["step"], record[metric]) for record in records if metric in record]
    finite = [(step, value * scale) for step, value in found if value is not None]
    return Curve([s for s, _ in finite], [v for _, v in finite], [s for s, v in found if v is None])


def is_noisy(values: Sequence[float]) -> bool:
    """Whether smoothing helps: the values are many, and walk the length of their own range more than four times."""
    if len(values) < MIN_POINTS_TO_SMOOTH:
        return False
    path = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    return path > 4 * (max(values) - min(values))


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over some 4% of the values, free of the bias towards its start."""
    decay = 1 - 1 / max(3.0, SMOOTHING_FRACTION * len(values))
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return averages


def thin(values: Sequence[float]) -> list[int]:
    """Indices of at most about MAX_POINTS values to draw: of each stretch its least and its greatest, so that spikes stay."""
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    stretch = math.ceil(2 * len(values) / MAX_POINTS)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        indices = range(start, min(start + stretch, len(values)))
        kept |= {min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)}
    return sorted(kept)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`, `about` so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [round(index * spacing, 12 - math.floor(math.log10(spacing))) for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high`, at most five or so."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Labels that tell neighbouring ticks apart, with one suffix for all: 0.9998 and 1.0000, or 10k and 20k."""
    if not values:
        return []
    factor, suffix = _unit_for(max(abs(value) for value in values))
    spacing = min((abs(b - a) for a, b in zip(values, values[1:], strict=False)), default=abs(values[0]) or 1.0)
    decimals = max(0, -math.floor(math.log10(spacing / factor) + 1e-9))
    return [f"{value / factor:.{decimals}f}{suffix}" if value else "0" for value in values]


def format_value(value: float, digits: int = 4) -> str:
    """A number as people write it: 0.5312, 12.35k, 2.5e-6."""
    factor, suffix = _unit_for(abs(value))
    if value == int(value) and factor == 1:
        return str(int(value))
    return f"{value / factor:.{digits}g}{suffix}"


def format_measured(value: float, error: float) -> str:
    """A mean and its standard error, both with the decimals that the error's first two digits ask for."""
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
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
