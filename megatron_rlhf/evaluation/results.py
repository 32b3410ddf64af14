"""What evaluations left in their folders, read for the page."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.text_files import iterate_text_file
from megatron_rlhf.evaluation.policies import Scores
from megatron_rlhf.evaluation.reward_accuracy import group_name
from megatron_rlhf.monitoring.metrics import LARGEST, read_metrics

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
            read_metrics(metrics) if metrics.exists() else [],
            list(_answers(answers if answers.exists() else folder / ANSWERS)),
            list(_judged(own / JUDGED)),
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
        return "\n\n".join(
            part.read_text(encoding="utf-8", errors="replace").strip() for part in parts if part.exists()
        )

    def figures(self) -> dict[str, float]:
        """Its last metrics."""
        last: dict[str, float] = {}
        for record in self.metrics:
            last |= {name: value for name, value in record.items() if value is not None}
        return last


def read_rankings(path: Path) -> list[dict[str, Any]]:
    """Rankings of people with `sources`, as megatron-rlhf label exports them: {"prompt" (as a text), "ranks", "sources"}.

    Raises:
        UserError: There are none, or a record is none.
    """
    from megatron_rlhf.data.records import read_records  # takes a second

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected rankings that megatron-rlhf label exported")
    rows = []
    for record in read_records(path):
        if missing := [name for name in ("prompt", "ranks", "sources") if name not in record]:
            raise record.mistake(f"no {missing[0]!r}; expected rankings that megatron-rlhf label exported")
        prompt, ranks, sources = (record.value(name) for name in ("prompt", "ranks", "sources"))
        if not (_is_list(ranks, _is_number) and _is_list(sources, _is_name) and len(ranks) == len(sources)):
            raise record.mistake(
                "'ranks' must be a list of numbers and 'sources' one of as many names (or null), not "
                f"{json.dumps([ranks, sources])[:80]}"
            )
        prompt = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        rows.append({"prompt": prompt, "ranks": ranks, "sources": sources})
    return rows


def _answers(path: Path) -> Iterator[dict[str, Any]]:
    for where, row in _rows(path, ("prompt", "response")):
        for name in ("prompt", "response"):
            if not isinstance(row[name], str):
                raise UserError(f"{where}: {name!r} must be a text, not {json.dumps(row[name])[:60]}")
        if row.get("score") is not None and not _is_number(row["score"]):
            raise UserError(f"{where}: 'score' must be a finite number or null, not {json.dumps(row['score'])[:60]}")
        for name in ("record", "given"):
            if not isinstance(row.get(name, {}), dict):
                raise UserError(f"{where}: {name!r} must be an object, not {json.dumps(row[name])[:60]}")
        yield row


def _judged(path: Path) -> Iterator[dict[str, Any]]:
    for where, row in _rows(path, ("prompt", "ranks", "scores", "lengths")):
        lists = [row[name] for name in ("ranks", "scores", "lengths")]
        if not all(_is_list(values, _is_number) for values in lists) or len(set(map(len, lists))) > 1:
            raise UserError(
                f"{where}: 'ranks', 'scores' and 'lengths' must be lists of the same length, of finite numbers"
            )
        if not isinstance(row["prompt"], str | int):
            raise UserError(f"{where}: 'prompt' must be a text or a number, not {json.dumps(row['prompt'])[:60]}")
        yield {**row, "group": group_name(row.get("group"))}


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    for number, row in iterate_text_file(path):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no {', '.join(map(repr, missing))}; found {json.dumps(row)[:80]}")
        yield f"{path}, line {number}", row


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)
