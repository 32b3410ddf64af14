"""The frontier of reward against held-out loss, one line a family of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.monitoring.picture import COLOURS, FAINT, INK

FAMILIES = {
    "text": "gamma, pretraining text beside PPO",
    "KL": "KL coefficient, no text",
    "auto": "ptx_coef=auto, at a ratio of gradients",
    "less text": "gamma, an eighth of the text",
    "longer": "gamma, three times the updates",
}
REWARDS = ("happy minus sad words", "reward score")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Each reward on its own axes; up and to the left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    base = next((row for row in rows if row["family"] == "base"), None)
    # Without text and at the KL coefficient of the runs with text: where both families begin.
    rows = [*rows, *({**row, "family": "KL", "at": "0.05"} for row in rows if row["run"] == "gamma_0")]
    for index, reward in enumerate(REWARDS, start=1):
        axes = figure.add_subplot(1, 2, index)
        for colour, (family, label) in zip(COLOURS, FAMILIES.items(), strict=False):
            points = sorted((row for row in rows if row["family"] == family), key=lambda row: float(row["at"]))
            x, y = [row["held-out loss"] for row in points], [row[reward][0] for row in points]
            error = [row[reward][1] for row in points]
            if points:
                axes.errorbar(
                    x, y, error, color=colour, marker="o", markersize=5, linewidth=1.5, capsize=2, label=label
                )
            for row in points:
                place = (row["held-out loss"], row[reward][0])
                axes.annotate(row["at"], place, (5, -10), textcoords="offset points", fontsize=8, color=colour)
        if base is not None:
            place = (base["held-out loss"], base[reward][0])
            axes.plot(*place, marker="*", markersize=11, color=INK)
            axes.annotate("base model", place, (8, 7), textcoords="offset points", fontsize=8, color=INK)
        axes.set_xlabel("loss on held-out text, nats a token", fontsize=9, color=INK)
        axes.set_ylabel(reward, fontsize=9, color=INK)
        axes.tick_params(labelsize=8, labelcolor=INK, length=0)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.spines[:].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=160, facecolor="white")
    return path
