"""What a run records at each step: its metrics, and some of the text it sampled."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.files import StepFile, read_records
from megatron_rlhf.monitoring.mirrors import Mirror, Services, TensorBoard

logger = logging.getLogger(__name__)
LARGEST = 1e300
"""Sums and differences of such values are finite."""


class MetricsLogger:
    """Appends to `metrics.jsonl`, and shows the same values in TensorBoard and elsewhere.

    Construct it on every rank, `enabled` on one: on the others all methods do nothing.
    """

    def __init__(self, run_dir: Path, enabled: bool, tensorboard: bool = True, services: Services | None = None):
        self._file = StepFile(Path(run_dir) / "metrics.jsonl", enabled)
        self.mirrors: list[Mirror] = []
        services = services or Services()
        services.require()
        if enabled:
            self.mirrors += [TensorBoard(Path(run_dir) / "tensorboard")] if tensorboard else []
            self.mirrors += services.connect(Path(run_dir))

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write the metrics of one step; on disk when this returns."""
        self._file.append(step, [metrics])
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        _show(self.mirrors, step, lambda mirror: mirror.log(step, finite))

    def truncate(self, step: int) -> None:
        """Discard all steps after `step`. Called at resume, it makes the file the same as without an interruption."""
        self._file.truncate(step)
        for mirror in self.mirrors:
            mirror.truncate(step)

    def close(self) -> None:
        """Close the files and end the W&B run."""
        self._file.close()
        for mirror in self.mirrors:
            try:
                mirror.close()
            except OSError as error:  # a disk that was full for a while
                logger.warning("%s is incomplete: %s", type(mirror).__name__, error)


class SamplesLogger:
    """Appends sampled rows (prompt, response, score, kl, ...) to `samples.jsonl`; does nothing unless `enabled`."""

    def __init__(self, run_dir: Path, enabled: bool, mirrors: Sequence[Mirror] = ()):
        self._file = StepFile(Path(run_dir) / "samples.jsonl", enabled)
        self._mirrors = mirrors

    def log(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write the samples of one step, one per line."""
        rows = list(samples)
        self._file.append(step, rows)
        if rows:
            _show(self._mirrors, step, lambda mirror: mirror.log_samples(step, rows))

    def truncate(self, step: int) -> None:
        """Forget all steps after `step`."""
        self._file.truncate(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _show(mirrors: Sequence[Mirror], step: int, show: Callable[[Mirror], None]) -> None:
    for mirror in mirrors:
        try:
            show(mirror)
        except OSError as error:  # a full disk, no network: the important copy is in the run folder
            logger.warning("step %d is missing in %s: %s", step, type(mirror).__name__, error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order. Values that were not finite, or are too large to be drawn, are None.

    Raises:
        UserError: a line that is no record, or a value that is no number.
    """
    return [
        {name: _number(value, name, f"{path}, line {line}") for name, value in record.items()}
        for line, record in enumerate(read_records(Path(path)), start=1)
    ]


def _number(value: Any, name: str, where: str) -> float | None:
    if isinstance(value, int | float) and abs(value) <= LARGEST:
        return value
    if name == "step" or not isinstance(value, int | float | None):
        raise UserError(f"{where}: {name} must be a number, not {value!r:.60}")
    return None
