"""A run, or several side by side, on one page: `report.html`, a single file that opens without a network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring import charts
from megatron_rlhf.monitoring.charts import Chart, line_chart, panel_chart, step_axis, time_chart
from megatron_rlhf.monitoring.curves import curve, format_measured, format_value
from megatron_rlhf.monitoring.files import replacing
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.monitoring.panels import HEADLINES, TIME_TOTAL, groups_for, panel_of
from megatron_rlhf.monitoring.samples import SampleColumn, last_samples, samples_by_step
from megatron_rlhf.monitoring.timeline import Timeline, last_timeline

Records = list[dict[str, Any]]
KINDS = {"policy/": "PPO", "rm/": "Reward model", "sft/": "Supervised fine-tuning"}


@dataclass(frozen=True)
class Tile:
    """A headline figure: its current value and its first."""

    label: str
    unit: str
    last: str
    first: str


@dataclass(frozen=True)
class Section:
    """Tables and charts under one heading."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    tables: list["Table"] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column naming the row."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""


@dataclass(frozen=True)
class Page:
    """Everything the template shows."""

    title: str
    kind: str
    facts: list[str] = field(default_factory=list)
    text: str = ""
    table: Table | None = None
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    samples: list[SampleColumn] = field(default_factory=list)
    config: str = ""
    refresh: int | None = None
    """Seconds after which an open page loads itself again."""
    details: list[tuple[str, str]] = field(default_factory=list)
    """Titles and texts that are folded up at the end."""

    @property
    def has_trends(self) -> bool:
        """Whether a line is too noisy to be read as it is."""
        return any(line.smoothed for section in self.sections for chart in section.charts for line in chart.lines)


def write_report(run_dir: Path, path: Path | None = None, refresh: int | None = None) -> Path:
    """Write `run_dir/report.html` from the run's config, metrics and samples; what is missing is left out.

    It replaces the report of an earlier call, so a run may call it repeatedly while it continues.

    Args:
        path: another file to write.
        refresh: an open page loads itself again after this many seconds.
    """
    run_dir = Path(run_dir).resolve()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; expected the run.dir of a run")
    records = _metrics(run_dir)
    config = run_dir / "config.yaml"
    page = Page(
        title=run_dir.name,
        kind=_kind(_names(records)),
        facts=_facts(records),
        tiles=_tiles(records),
        sections=_sections(records, last_timeline(run_dir)),
        samples=samples_by_step(run_dir / "samples.jsonl"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        refresh=refresh,
    )
    return write_page(page, path or run_dir / "report.html")


def write_last_figures(run_dirs: Sequence[Path], path: Path, refresh: int | None = None) -> Path:
    """Write a page that compares runs: a table of where each of them is, and their curves on the same axes."""
    runs = {_short_name(run_dir, run_dirs): run_dir for run_dir in run_dirs}
    rows = []
    for name, run_dir in runs.items():
        records = _metrics(run_dir)
        figures = {"run": name, "step": records[-1]["step"] if records else None}
        for metric in HEADLINES:
            panel = panel_of(metric)
            values = curve(records, metric, panel.scale).values
            if values:
                figures[f"{panel.title}, {panel.unit}"] = values[-1]
        rows.append(figures)
    return write_comparison(rows, runs, path, title=" · ".join(runs), refresh=refresh)


def write_comparison(
    rows: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Path],
    path: Path,
    title: str,
    text: str = "",
    metrics: Sequence[str] = HEADLINES,
    refresh: int | None = None,
) -> Path:
    """Write a page with a table and the same metrics of several runs overlaid.

    `rows` are the table's lines, column name -> cell: text, a number, or (value, standard error). `runs` maps the name
    of a run to its folder. Paragraphs of `text` are separated by empty lines.
    """
    by_run = {name: _metrics(Path(run_dir)) for name, run_dir in runs.items()}
    section = Section("Curves", [])
    if any(by_run.values()):
        x = step_axis([record for records in by_run.values() for record in records])
        for metric in metrics:
            panel = panel_of(metric)
            curves = {name: curve(records, metric, panel.scale) for name, records in by_run.items()}
            if any(curves.values()):
                section.charts.append(line_chart(panel, x, curves, bands={}))
    page = Page(
        title=title,
        kind="Comparison",
        text=text,
        table=make_table(rows) if rows else None,
        sections=[section] if section.charts else [],
        samples=[last_samples(Path(run_dir) / "samples.jsonl", name) for name, run_dir in runs.items()],
        refresh=refresh,
    )
    return write_page(page, Path(path))


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows as plain text with aligned columns, for a terminal."""
    table = make_table(rows)
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _short_name(run_dir: Path, others: Sequence[Path]) -> str:
    """The folder's own name, or its path where several have that name."""
    same = [other for other in others if other.resolve().name == run_dir.resolve().name]
    return str(run_dir) if len(same) > 1 else run_dir.resolve().name


def _metrics(run_dir: Path) -> Records:
    path = run_dir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _names(records: Records) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _kind(names: list[str]) -> str:
    return next((kind for prefix, kind in KINDS.items() if any(name.startswith(prefix) for name in names)), "Run")


def _facts(records: Records) -> list[str]:
    if not records:
        return ["no steps yet"]
    last = records[-1]
    facts = [f"step {last['step']:,}"]
    facts += [f"{format_value(last[name])} {name}" for name in ("samples", "tokens") if last.get(name)]
    seconds = sum(record.get(TIME_TOTAL) or 0.0 for record in records)
    return facts + ([f"{timedelta(seconds=round(seconds))} of training"] if seconds else [])


def _tiles(records: Records) -> list[Tile]:
    tiles = []
    for name in HEADLINES:
        panel = panel_of(name)
        values = curve(records, name, panel.scale).values
        if values:
            tiles.append(Tile(panel.title, panel.unit, format_value(values[-1], 3), format_value(values[0], 3)))
    return tiles


def _sections(records: Records, timeline: Timeline | None) -> list[Section]:
    if not records:
        return []
    x = step_axis(records)
    sections = [
        Section(group.title, [panel_chart(panel, x, records) for panel in group.panels])
        for group in groups_for(_names(records))
    ]
    time = time_chart(x, records)
    if time or timeline:
        cost = next((section for section in sections if section.title == "Cost"), None)
        if cost is None:
            sections.append(cost := Section("Cost", []))
        cost.charts[:0] = [time] if time else []
        cost.timelines.extend([timeline] if timeline else [])
    return sections


def make_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Column name -> cell, for each row: text, a number, or (value, standard error)."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, [[_cell(row.get(name)) for name in columns] for row in rows], title)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "\N{EN DASH}"
        case (mean, error):
            return format_measured(mean, error) if math.isfinite(error) else format_value(mean)
        case float() if math.isnan(value):
            return "\N{EN DASH}"
        case int() | float():
            return format_value(value)
        case _:
            return str(value)


def write_page(page: Page, path: Path) -> Path:
    """Write the page as one HTML file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    template = environment.get_template("report.html.j2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(template.render(page=page, frame=charts, written=written).encode())
    return path
