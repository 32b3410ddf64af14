"""From curves to the geometry of SVG charts; the template gives them colours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rlhf.monitoring.curves import (
    Curve,
    curve,
    format_ticks,
    format_value,
    is_noisy,
    log_ticks,
    smooth,
    thin,
    ticks,
)
from megatron_rlhf.monitoring.panels import TIME_TOTAL, Panel, phases

WIDTH, HEIGHT = 440, 206
LEFT, RIGHT, TOP, BOTTOM = 52, 424, 10, 182
FEW_POINTS = 40
MAX_MARKS = 100
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, panel: Panel) -> "Axis":
        """An axis with a small margin around all values; logarithmic only if they are positive and span a decade."""
        low, high = min(values), max(values)
        if panel.logarithmic and low > 0 and high >= 10 * low:
            return cls(low / 1.2, high * 1.2, start, end, logarithmic=True)
        if panel.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        # Values that differ only by rounding are a constant: magnified, they would look like a change.
        room = 0.06 * (high - low) if high - low > 1e-9 * abs(high) else 0.1 * abs(high) or 1.0
        grounded = panel.from_zero and low == 0
        return cls(low if grounded else low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        place = math.log if self.logarithmic else float
        share = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Position in pixels and label of each tick."""
        if self.logarithmic:
            return [(self(value), format_value(value)) for value in log_ticks(self.low, self.high)]
        values = ticks(self.low, self.high, about)
        return [(self(value), label) for value, label in zip(values, format_ticks(values), strict=True)]


@dataclass
class Line:
    """One line, or one layer of a stack: SVG paths, and the numbers behind the points of the first of them."""

    label: str
    path: str
    steps: str
    values: str
    last: str
    smoothed: str = ""
    band: str = ""
    dots: list[tuple[float, float]] = field(default_factory=list)
    errors: list[tuple[float, float, float]] = field(default_factory=list)
    """Error bars: x, and y of both ends."""
    not_finite: list[float] = field(default_factory=list)


@dataclass
class Chart:
    """One set of axes with everything on it."""

    title: str
    unit: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    stacked: bool = False
    x_label: str = "step"

    @property
    def has_band(self) -> bool:
        """Whether any line has a band around it."""
        return any(line.band for line in self.lines)

    @property
    def has_gaps(self) -> bool:
        """Whether a value was not finite at some step."""
        return any(line.not_finite for line in self.lines)

    @property
    def summary(self) -> str:
        """Text alternative of the chart, for those who cannot see it."""
        return "; ".join(f"{line.label or self.title} ends at {line.last} {self.unit}" for line in self.lines)


def step_axis(records: Records) -> Axis:
    """The horizontal axis, first step to last: shared by all charts of a page, so that they can be compared."""
    steps = [record["step"] for record in records]
    low, high = min(steps), max(steps)
    return Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, low + 1, LEFT, RIGHT)


def _step_ticks(x: Axis) -> list[tuple[float, str]]:
    # No more ticks than steps: there is no step 1.5.
    return x.ticks(min(6, round(x.high - x.low)))


def line_chart(panel: Panel, x: Axis, curves: Mapping[str, Curve], bands: Mapping[str, Curve]) -> Chart:
    """Lines over the steps, one for each label, each with its band if it has one."""
    curves = {label: drawn for label, drawn in curves.items() if drawn}
    half_widths = {label: _half_widths(curves[label], band) for label, band in bands.items() if label in curves}
    values = [value for drawn in curves.values() for value in drawn.values]
    for label, widths in half_widths.items():
        values += [v + sign * w for v, w in zip(curves[label].values, widths, strict=True) for sign in (-1, 1)]
    y = Axis.around(values or [0.0], BOTTOM, TOP, panel)
    lines = [_line(label, drawn, x, y, half_widths.get(label)) for label, drawn in curves.items()]
    return Chart(panel.title, panel.unit, _step_ticks(x), y.ticks(4), lines)


def panel_chart(panel: Panel, x: Axis, records: Records) -> Chart:
    """The metrics of a panel in one run."""
    curves = {label: curve(records, name, panel.scale) for name, label in panel.metrics.items()}
    band = curve(records, panel.band, panel.scale) if panel.band else None
    return line_chart(panel, x, curves, dict.fromkeys(list(curves)[:1], band) if band else {})


def time_chart(x: Axis, records: Records) -> Chart | None:
    """Seconds of a step by phase, stacked; the rest of `time/step_s` is shown as "other"."""
    names = phases(dict.fromkeys(name for record in records for name in record))
    layers = {name.removeprefix("time/").removesuffix("_s"): [r.get(name) or 0.0 for r in records] for name in names}
    known = [sum(r.get(name) or 0.0 for name in names) for r in records]
    rest = [max(0.0, (r.get(TIME_TOTAL) or 0.0) - seconds) for r, seconds in zip(records, known, strict=True)]
    if sum(rest) > 0.01 * sum(known):
        layers["other" if names else "step"] = rest
    if not layers:
        return None
    everything = sum(map(sum, layers.values())) or 1.0
    shares = {label: sum(layer) / everything for label, layer in layers.items()}
    steps, layers = _averaged([record["step"] for record in records], layers)
    panel = Panel("Time of a step, by phase", "seconds", {}, from_zero=True)
    y = Axis.around([sum(layer) for layer in zip(*layers.values(), strict=True)], BOTTOM, TOP, panel)
    lines, floor = [], [0.0] * len(steps)
    for label, layer in layers.items():
        ceiling = [low + value for low, value in zip(floor, layer, strict=True)]
        outline = f"{_path(steps, ceiling, x, y)}L{_path(steps[::-1], floor[::-1], x, y)[1:]}Z"
        lines.append(Line(label, outline, _steps(steps), _values(layer), f"{shares[label]:.0%}"))
        floor = ceiling
    return Chart(panel.title, panel.unit, _step_ticks(x), y.ticks(4), lines, stacked=True)


def _averaged(steps: list[float], layers: dict[str, list[float]]) -> tuple[list[float], dict[str, list[float]]]:
    """Means over stretches of steps, as jumping layers are unreadable. A single step becomes two, to have a width."""
    stretch = max(1, round(len(steps) / 60))
    starts = range(0, len(steps), stretch)

    def mean(values: list[float]) -> list[float]:
        means = [sum(values[i : i + stretch]) / len(values[i : i + stretch]) for i in starts]
        return means if len(means) > 1 else means * 2

    centres = mean(steps) if len(starts) > 1 else [steps[0] - 0.5, steps[-1] + 0.5]
    return centres, {label: mean(layer) for label, layer in layers.items()}


def _half_widths(drawn: Curve, band: Curve) -> list[float]:
    at = dict(zip(band.steps, band.values, strict=True))
    return [at.get(step, 0.0) for step in drawn.steps]


def _line(label: str, drawn: Curve, x: Axis, y: Axis, half_widths: list[float] | None) -> Line:
    kept = thin(drawn.values)
    steps = [drawn.steps[i] for i in kept]
    noisy = is_noisy(drawn.values)
    middle = smooth(drawn.values) if noisy else drawn.values
    band = ""
    if half_widths and len(steps) > 1:
        width = smooth(half_widths) if noisy else half_widths
        top = _path(steps, [middle[i] + width[i] for i in kept], x, y)
        bottom = _path(steps[::-1], [middle[i] - width[i] for i in kept[::-1]], x, y)
        band = f"{top}L{bottom[1:]}Z"
    return Line(
        label=label,
        path=_path(steps, [drawn.values[i] for i in kept], x, y),
        steps=_steps(steps),
        values=_values([drawn.values[i] for i in kept]),
        last=format_value(drawn.values[-1]) if drawn.values else "not finite",
        smoothed=_path(steps, [middle[i] for i in kept], x, y) if noisy else "",
        band=band,
        dots=[(x(drawn.steps[i]), y(drawn.values[i])) for i in kept] if len(kept) <= FEW_POINTS else [],
        not_finite=[x(step) for step in drawn.not_finite[:MAX_MARKS]],
    )


def _path(steps: Sequence[float], values: Sequence[float], x: Axis, y: Axis) -> str:
    points = (f"{x(step):g},{y(value):g}" for step, value in zip(steps, values, strict=True))
    return "M" + "L".join(points) if steps else ""


def _steps(steps: Sequence[float]) -> str:
    return " ".join(f"{step:.10g}" for step in steps)


def _values(values: Sequence[float]) -> str:
    return " ".join(format_value(value, digits=6) for value in values)


@dataclass(frozen=True)
class Point:
    """A measurement; without an interval it gets no error bar."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def point_chart(
    title: str, unit: str, x_label: str, lines: Mapping[str, Sequence[Point]], from_zero: bool = False
) -> Chart:
    """Each line joins its points as they come. `from_zero` is about the horizontal axis."""
    points = [point for line in lines.values() for point in line]
    heights = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    x = Axis.around([point.x for point in points], LEFT, RIGHT, Panel("", "", {}, from_zero=from_zero))
    y = Axis.around(heights, BOTTOM, TOP, Panel("", "", {}))
    drawn = [_points(label, line, x, y) for label, line in lines.items() if line]
    return Chart(title, unit, x.ticks(4), y.ticks(4), drawn, x_label=x_label)


def _points(label: str, points: Sequence[Point], x: Axis, y: Axis) -> Line:
    return Line(
        label=label,
        path="M" + "L".join(f"{x(point.x):g},{y(point.y):g}" for point in points),
        steps=" ".join(format_value(point.x, 4).replace(" ", "\N{NO-BREAK SPACE}") for point in points),
        values=" ".join(_measured(point) for point in points),
        last=format_value(points[-1].y),
        dots=[(x(point.x), y(point.y)) for point in points],
        errors=[
            (x(point.x), y(point.low), y(point.high))
            for point in points
            if point.low is not None and point.high is not None
        ],
    )


def _measured(point: Point) -> str:
    """Values are separated by spaces, so there is none in one."""
    text = format_value(point.y, 4)
    if point.low is not None and point.high is not None:
        text += f" ({format_value(point.low, 4)}..{format_value(point.high, 4)})"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
