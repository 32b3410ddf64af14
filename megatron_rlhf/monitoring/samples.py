"""The sampled text that a report shows: a few rows of a few steps, clipped, so that the page stays small."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhf.monitoring.curves import format_value
from megatron_rlhf.monitoring.files import read_records

MAX_STEPS = 12
ROWS_A_STEP = 6
MAX_CHARACTERS = 1500


@dataclass(frozen=True)
class Sample:
    """A prompt and what the policy answered."""

    prompt: str
    response: str
    figures: dict[str, str]
    """Everything else that was logged with it: score, kl, ..."""


@dataclass(frozen=True)
class SampleColumn:
    """Samples shown one below the other."""

    label: str
    rows: list[Sample]


def samples_by_step(path: Path) -> list[SampleColumn]:
    """Columns for the first step, the last, and some evenly spread between them; none without a file."""
    by_step = _read(path)
    steps = sorted(by_step)
    if len(steps) > MAX_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    return [SampleColumn(f"step {step}", by_step[step]) for step in steps]


def last_samples(path: Path, label: str) -> SampleColumn:
    """The samples of a run's last step."""
    by_step = _read(path)
    return SampleColumn(label, by_step[max(by_step)] if by_step else [])


def sample_column(label: str, rows: Iterable[Mapping[str, Any]]) -> SampleColumn:
    """A column of given rows {"prompt", "response", any figures}."""
    return SampleColumn(label, [_sample(row) for row in rows])


def _read(path: Path) -> dict[int, list[Sample]]:
    """The rows of held-out prompts, which are the same at each step, where there are some; else all."""
    by_kind: dict[bool, dict[int, list[Sample]]] = {True: {}, False: {}}
    for record in read_records(path) if path.exists() else ():
        rows = by_kind[bool(record.get("held_out"))].setdefault(record["step"], [])
        if len(rows) < ROWS_A_STEP:
            rows.append(_sample(record))
    return by_kind[True] or by_kind[False]


def _sample(record: Mapping[str, Any]) -> Sample:
    figures = {name: value for name, value in record.items() if name not in ("step", "prompt", "response", "held_out")}
    return Sample(
        prompt=_clip(str(record.get("prompt", ""))),
        response=_clip(str(record.get("response", ""))),
        figures={name: _figure(value) for name, value in figures.items()},
    )


def _figure(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format_value(value, 3)
    return str(value).lower() if isinstance(value, bool) else _clip(str(value))


def _clip(text: str) -> str:
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} … ({left_out:,} more characters)"
