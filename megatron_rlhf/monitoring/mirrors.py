"""Where metrics and samples are shown in addition to the run folder: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_rlhf.config.errors import UserError


class Mirror(Protocol):
    """A second destination for metrics and samples."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the sampled text of one step."""

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

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Does nothing: they are in samples.jsonl and in the report."""

    def truncate(self, step: int) -> None:
        """Event files cannot be truncated; the next one tells TensorBoard to hide earlier events after `step`."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@dataclass(frozen=True)
class Services:
    """Experiment trackers that also get what a run records; none unless named."""

    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_tags: Sequence[str] = ()
    mlflow_experiment: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings, nested."""

    def require(self) -> None:
        """Raise a `UserError` if one cannot be used. Called on all ranks, so that all fail and none waits."""
        if self.wandb_project is None and (self.wandb_entity or self.wandb_tags):
            given = f"run.wandb_entity={self.wandb_entity}" if self.wandb_entity else "run.wandb_tags"
            raise UserError(f"{given} is for W&B: give run.wandb_project too")
        for name, library, extra in (
            (self.wandb_project, "wandb", "wandb"),
            (self.mlflow_experiment, "mlflow", "mlflow"),
        ):
            if name is not None and importlib.util.find_spec(library) is None:
                title = {"wandb": "W&B", "mlflow": "MLflow"}[library]
                raise UserError(
                    f"{title} logging was asked for but {library} is not installed: pip install megatron_rlhf[{extra}]"
                )

    def connect(self, run_dir: Path) -> list[Mirror]:
        """A mirror for each that is named. On one rank.

        Raises:
            UserError: a service refuses, or does not answer.
        """
        mirrors: list[Mirror] = []
        wanted: list[tuple[str, str | None, Callable[[], Mirror]]] = [
            ("wandb_project", self.wandb_project, lambda: WeightsAndBiases(self, run_dir)),
            (
                "mlflow_experiment",
                self.mlflow_experiment,
                lambda: MLflow(str(self.mlflow_experiment), self.config, run_dir),
            ),
        ]
        for key, name, connected in wanted:
            if name is not None:
                try:
                    mirrors.append(connected())
                except Exception as error:  # whatever the service's library raises: no key, no network, no such project
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    raise UserError(f"run.{key}={name}: the service cannot be used: {reason}") from error
        return mirrors


class WeightsAndBiases:
    """One W&B run for each run folder, however often it is resumed: its id is kept in the folder."""

    def __init__(self, services: Services, run_dir: Path):
        import wandb

        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._table = wandb.Table
        self._run = wandb.init(
            project=services.wandb_project,
            entity=services.wandb_entity,
            tags=list(services.wandb_tags),
            config=dict(services.config),
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            allow_val_change=True,  # what a resume may change, resume_table.py says
            dir=str(run_dir),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the samples of one step as a table."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = self._table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self._run.log({_samples_name(rows): table}, step=step)

    def truncate(self, step: int) -> None:
        """Does nothing: W&B ignores a step it has seen, and a resumed run only repeats the same values."""

    def close(self) -> None:
        """Wait for the upload to end."""
        self._run.finish()


class MLflow:
    """One MLflow run for each run folder, at the server that MLFLOW_TRACKING_URI names; its id is kept in the folder."""

    def __init__(self, experiment: str, config: Mapping[str, Any], run_dir: Path):
        import mlflow

        self._client, self._entities, self._failure = mlflow.MlflowClient(), mlflow.entities, mlflow.MlflowException
        id_file = run_dir / "mlflow_run_id.txt"
        if not id_file.exists():
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            id_file.write_text(self._client.create_run(number, run_name=run_dir.name).info.run_id)
            for name, value in _flat(config):
                self._client.log_param(id_file.read_text(), name, str(value)[:MLFLOW_LONGEST])
        self._run_id = id_file.read_text()
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        now = int(time.time() * 1000)
        batch = [self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        with self._as_os_errors():
            self._client.log_batch(self._run_id, metrics=batch)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the samples of one step as an artifact, a JSON list of rows."""
        with self._as_os_errors():
            self._client.log_text(
                self._run_id, json.dumps(list(rows), indent=1), f"{_samples_name(rows)}/step_{step}.json"
            )

    def truncate(self, step: int) -> None:
        """Does nothing: a resumed run repeats the same values at the same steps."""

    def close(self) -> None:
        """Mark the run as finished."""
        with self._as_os_errors():
            self._client.set_terminated(self._run_id)

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        """A server that does not answer is no reason to stop a run: OSError is logged."""
        try:
            yield
        except self._failure as error:
            raise OSError(str(error)) from error


MLFLOW_LONGEST = 500
"""Characters of a setting's value that every version of MLflow accepts."""


def _samples_name(rows: Sequence[Mapping[str, Any]]) -> str:
    return "held_out_samples" if any(row.get("held_out") for row in rows) else "samples"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
