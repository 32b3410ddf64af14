"""Who did what when in a step: `timeline.jsonl`, and the bars that the report draws of one of its lines."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.charts import WIDTH, Axis
from megatron_rlhf.monitoring.curves import format_value
from megatron_rlhf.monitoring.files import read_records
from megatron_rlhf.monitoring.panels import Panel
from megatron_rlhf.monitoring.progress import Span

NAME = "timeline.jsonl"
WAITING = "waiting"
"""The phase of ranks that have nothing to do: a gap in their bar."""
SHORTEST = 0.002
"""Share of a step that a bar shows; shorter phases are left out."""
LEFT, RIGHT = 4, 2 * WIDTH - 12


@dataclass(frozen=True)
class Block:
    """A phase of one side, in pixels."""

    phase: str
    colour: int
    x: float
    width: float
    label: str
    """Read when pointed at."""


@dataclass(frozen=True)
class Bar:
    """One side."""

    side: str
    blocks: list[Block]

    @property
    def summary(self) -> str:
        """Text alternative, for those who cannot see it."""
        return f"{self.side}: {', '.join(block.label for block in self.blocks)}"


@dataclass(frozen=True)
class Timeline:
    """Bars over a common axis of seconds."""

    title: str
    bars: list[Bar]
    phases: list[str]
    """In the order of their colours."""
    x_ticks: list[tuple[float, str]]
    HEIGHT: ClassVar[int] = 26
    """Of a bar."""


def merged(spans: Sequence[Span], seconds: float) -> list[Span]:
    """Without the shortest, and those of one phase that follow each other as one: what is worth keeping of a step."""
    kept: list[Span] = []
    for phase, begin, end in spans:
        if phase == WAITING or end - begin < SHORTEST * seconds:
            continue
        if kept and kept[-1][0] == phase and begin - kept[-1][2] < SHORTEST * seconds:
            kept[-1] = (phase, kept[-1][1], end)
        else:
            kept.append((phase, begin, end))
    return [(phase, round(begin, 4), round(end, 4)) for phase, begin, end in kept]


def together(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds in which both have a span."""
    return sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for _, begin, end in one
        for _, other_begin, other_end in other
    )


def last_timeline(run_dir: Path) -> Timeline | None:
    """Of the last step that `run_dir/timeline.jsonl` has."""
    path = run_dir / NAME
    last = deque(read_records(path) if path.exists() else (), maxlen=1)
    if not last:
        return None
    try:
        return draw(last[0]["step"], last[0]["sides"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: the last line is not what a run writes: {error!r}; delete the file") from error


def draw(step: int, sides: Mapping[str, Sequence[Sequence]]) -> Timeline:
    """`sides`: name -> (phase, begin, end) in seconds since the step began."""
    phases = list(dict.fromkeys(phase for spans in sides.values() for phase, *_ in spans))
    end = max((end for spans in sides.values() for *_, end in spans), default=1.0)
    x = Axis.around([0.0, end], LEFT, RIGHT, Panel("", "", {}, from_zero=True))
    bars = []
    for side, spans in sides.items():
        blocks = [
            Block(
                phase,
                phases.index(phase),
                x(begin),
                max(round(x(end) - x(begin), 1), 0.5),
                f"{phase} {format_value(begin, 3)} to {format_value(end, 3)} s",
            )
            for phase, begin, end in spans
        ]
        bars.append(Bar(side, blocks))
    return Timeline(f"Who did what in step {step}", bars, phases, x.ticks(6))
