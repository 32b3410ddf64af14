"""What evaluations left in their folders, read for the page."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.text_files import iterate_text_file
from megatron_rlhf.evaluation.policies import Scores
from megatron_rlhf.monitoring.files import read_records

JUDGED = "comparisons.jsonl"
"""Comparisons with a reward model's scores."""
ANSWERS = "evaluation.jsonl"
GREEDY = " (greedy)"
"""What the source of a greedy answer ends with."""


@dataclass(frozen=True)
class Run:
    """One evaluation, or one PPO run."""

    name: str
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Rows {"prompt", "response", "score", ...}."""
    judged: list[dict[str, Any]] = field(default_factory=list)
    """Rows as `reward_accuracy.pairs_of` takes them."""

    @classmethod
    def read(cls, name: str, folder: Path, is_training: bool = False) -> "Run":
        """The results of a training, or of an evaluation, which may lie inside a training's folder.

        Raises:
            UserError: There are none, or a line is none.
        """
        if not folder.is_dir():
            raise UserError(f"{name}={folder}: no such folder; expected the run.dir of an evaluation or of PPO")
        inner = folder / "evaluation"
        own = inner if inner.is_dir() and not is_training else folder
        metrics, answers = own / "metrics.jsonl", own / ANSWERS
        found = cls(
            name,
            own,
            list(read_records(metrics)) if metrics.exists() else [],
            list(_rows(answers if answers.exists() else folder / ANSWERS, ("prompt", "response"))),
            list(_rows(own / JUDGED, ("prompt", "ranks", "scores", "lengths"))),
        )
        if not (found.metrics or found.answers or found.judged):
            raise UserError(f"{name}={folder}: nothing was measured there: no metrics.jsonl, {ANSWERS} or {JUDGED}")
        return found

    @property
    def scores(self) -> Scores:
        """Prompt -> scores by the reward model; empty where there was none."""
        return self._by_prompt("score")

    def _by_prompt(self, column: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        sampled = [row for row in self.answers if not str(row.get("source")).endswith(GREEDY)]
        for row in sampled or self.answers:
            if row.get(column) is not None:
                found.setdefault(row["prompt"], []).append(float(row[column]))
        return found

    def golds(self) -> Scores:
        """Prompt -> values of the rule, once `judge_by_rule` has added them."""
        return self._by_prompt("gold")

    @property
    def command(self) -> str:
        """How it was started, and its configuration."""
        parts = [self.folder / "command", self.folder / "config.yaml"]
        return "\n\n".join(part.read_text(encoding="utf-8").strip() for part in parts if part.exists())

    def figures(self) -> dict[str, float]:
        """Its last metrics."""
        last: dict[str, float] = {}
        for record in self.metrics:
            last |= {name: value for name, value in record.items() if isinstance(value, int | float)}
        return {name: value for name, value in last.items() if math.isfinite(value)}


def read_rankings(path: Path) -> list[dict[str, Any]]:
    """Rankings of people with `sources`, as megatron-rlhf label exports them."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected rankings that megatron-rlhf label exported")
    rows = list(_rows(path, ("prompt", "ranks", "sources")))
    if not rows:
        raise UserError(f"{path}: empty; at least one ranking is needed")
    return rows


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, row in iterate_text_file(path):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no {', '.join(map(repr, missing))}; found {json.dumps(row)[:80]}")
        lists = [row[name] for name in ("ranks", "scores", "lengths", "sources") if name in needed]
        if not all(isinstance(values, list) for values in lists) or len({len(values) for values in lists}) > 1:
            raise UserError(f"{path}, line {number}: ranks and what belongs to them must be lists of the same length")
        yield row
