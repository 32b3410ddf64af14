"""Where metrics are shown in addition to `metrics.jsonl`: TensorBoard and Weights & Biases."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlhf.config.errors import UserError


class Mirror(Protocol):
    """A second destination for metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step."""

    def truncate(self, step: int) -> None:
        """Discard what was shown of later steps."""

    def close(self) -> None:
        """Flush what is still buffered, and close."""


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar event for each metric."""
        if self._writer is None:
            # Importing it takes a second, and its constructor creates a file: only once there is something to write.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def truncate(self, step: int) -> None:
        """Event files cannot be truncated; the next one tells TensorBoard to hide earlier events after `step`."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def require_wandb() -> None:
    """Raise a `UserError` if W&B is not installed. Called on all ranks, so that all fail and none waits."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("W&B logging was asked for but wandb is not installed: pip install megatron_rlhf[wandb]")


class WeightsAndBiases:
    """One W&B run for each run folder, however often it is resumed: its id is kept in the folder."""

    def __init__(self, project: str, run_dir: Path):
        import wandb

        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project, name=run_dir.name, id=id_file.read_text(), resume="allow", dir=str(run_dir)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def truncate(self, step: int) -> None:
        """Does nothing: W&B ignores a step it has seen, and a resumed run only repeats the same values."""

    def close(self) -> None:
        """Wait for the upload to end."""
        self._run.finish()
