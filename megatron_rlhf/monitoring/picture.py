"""Curves of a few runs as a PNG, for a README."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.curves import curve, is_noisy, smooth
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.monitoring.panels import panel_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, distinguishable with any kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f6b7a")
INK, FAINT = "#28323e", "#d9dee5"
MAX_COLUMNS = 3


def write_picture(runs: Mapping[str, Path], metrics: Sequence[str], path: Path) -> Path:
    """Draw each metric on its own axes with a line for each run that has it. `runs` maps a name to a run folder."""
    # Imported only to draw, so that training does not wait for it; and without pyplot, which would look for a display.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    by_run = {name: read_metrics(Path(run_dir) / "metrics.jsonl") for name, run_dir in runs.items()}
    known = {name for records in by_run.values() for record in records for name in record}
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise UserError(f"metrics {unknown or 'is empty'}: no run has them; there are {', '.join(sorted(known))}")

    columns = min(MAX_COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows + 0.4), layout="constrained")
    for index, metric in enumerate(metrics, start=1):
        _draw(figure.add_subplot(rows, columns, index), metric, by_run.values())
    if len(runs) > 1:
        names = [Line2D([], [], color=colour, linewidth=2, label=name) for colour, name in zip(cycle(COLOURS), runs)]
        figure.legend(handles=names, loc="outside upper center", ncols=len(names), frameon=False, labelcolor=INK)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    return Path(path)


def _draw(axes: "Axes", metric: str, runs: Iterable[list[dict[str, Any]]]) -> None:
    """One metric, a line for each run: thin as measured and thick as its trend if it is noisy."""
    panel = panel_of(metric)
    for colour, records in zip(cycle(COLOURS), runs):
        drawn = curve(records, metric, panel.scale)
        noisy = is_noisy(drawn.values)
        if noisy:
            axes.plot(drawn.steps, drawn.values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(drawn.steps, smooth(drawn.values) if noisy else drawn.values, color=colour, linewidth=1.8)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel(panel.unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, labelcolor=INK, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=FAINT)
