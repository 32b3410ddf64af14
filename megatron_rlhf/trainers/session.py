"""What every run needs besides its algorithm: folder, logs, metrics, checkpoints, progress, report."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.monitoring.logs import setup_logging
from megatron_rlhf.monitoring.memory import peak_bytes
from megatron_rlhf.monitoring.metrics import MetricsLogger, SamplesLogger
from megatron_rlhf.monitoring.progress import PhaseTimer, Progress
from megatron_rlhf.monitoring.report import write_report
from megatron_rlhf.parallel.accelerators import describe_accelerators
from megatron_rlhf.parallel.collectives import largest
from megatron_rlhf.trainers.interruption import Interrupted, Interruption
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One run in its folder. All ranks call the same methods; one rank writes."""

    config: RunConfig
    metrics: MetricsLogger
    samples: SamplesLogger
    resume_from: Path | None
    timer: PhaseTimer = field(default_factory=lambda: PhaseTimer(_synchronize, peak_bytes))
    interruption: Interruption = field(default_factory=Interruption)
    _stops: bool = False
    _peak: float = 0.0

    @classmethod
    def open(cls, config: RunConfig, resolved_config: str) -> "Session":
        """Create the run folder (or find what to resume) and start logging.

        Raises:
            UserError: the folder cannot be written, holds another run, or has nothing to resume.
        """
        folder = Path(config.dir)
        first = dist.get_rank() == 0
        resume_from = sharded.latest(folder / "checkpoints") if config.resume or config.auto_resume else None
        if config.resume and resume_from is None:
            raise UserError(f"run.resume=true, but {folder / 'checkpoints'} holds no checkpoint to go on from")
        if resume_from is None and (folder / "checkpoints" / "latest").exists():
            raise UserError(f"run.dir={folder} holds another run: choose a new folder, or go on with run.resume=true")
        _require_writable(folder)
        dist.barrier()
        setup_logging(folder, dist.get_rank())
        if first:
            (folder / "config.yaml").write_text(resolved_config)
        session = cls(
            config=config,
            metrics=MetricsLogger(folder, enabled=first, wandb_project=config.wandb_project),
            samples=SamplesLogger(folder, enabled=first),
            resume_from=resume_from,
        )
        session.interruption.listen()
        log.info(describe_accelerators())
        log.info("run folder %s, %d ranks%s", folder, dist.get_world_size(), " (resumed)" if resume_from else "")
        return session

    @property
    def folder(self) -> Path:
        return Path(self.config.dir)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def restore(self, roles: Sequence[TrainedRole]) -> dict[str, Any]:
        """Fill the roles from the checkpoint to resume; returns the trainer's state, {} for a fresh run."""
        if self.resume_from is None:
            self.metrics.truncate(-1)
            self.samples.truncate(-1)
            return {}
        for trained in roles:
            sharded.load_role(self.resume_from, SavedRole(trained.role, trained.optimizer))
            if trained.average is not None:
                with trained.average.as_weights() as averaged:
                    sharded.load_role(self.resume_from, SavedRole(averaged))
        state = sharded.read_meta(self.resume_from)["state"]
        self.metrics.truncate(state["step"])
        self.samples.truncate(state["step"])
        log.info("resumed from %s at step %d", self.resume_from, state["step"])
        return state

    def save(
        self, name: str, roles: Sequence[TrainedRole], state: Mapping[str, Any], with_optimizer: bool = True
    ) -> None:
        """Write `checkpoints/name` with the trained roles, their averages, and the trainer's state.

        Raises:
            Interrupted: after it is written, when the run was asked to stop.
        """
        shapes: dict[str, Role] = {}
        with sharded.writing(self.checkpoints / name, self.config.keep_last) as folder:
            for trained in roles:
                optimizer = trained.optimizer if with_optimizer else None
                sharded.save_role(folder, SavedRole(trained.role, optimizer))
                shapes[trained.role.name] = trained.role
                if trained.average is not None:
                    with trained.average.as_weights() as averaged:
                        sharded.save_role(folder, SavedRole(averaged))
                        shapes[averaged.name] = averaged
            sharded.write_meta(folder, shapes, state)
        if dist.get_rank() == 0:  # a report to look at while the run goes on
            write_report(self.folder)
        if self._stops:
            self.close()
            raise Interrupted(f"asked to stop: saved {self.checkpoints / name}; go on with run.auto_resume=true")

    def save_is_due(self, step: int, last_step: int) -> bool:
        """After this step a checkpoint should be written: it is time, or the run was asked to stop. Collective."""
        if step == last_step:
            return True
        every = self.config.save_every
        self._stops = self.interruption.agreed()
        return self._stops or (every > 0 and step % every == 0)

    def last_step(self, scheduled: int) -> int:
        """Where this process stops: the end of the schedule, or run.stop_at_step before it."""
        return min(scheduled, self.config.stop_at_step or scheduled)

    def progress(self, total: int, initial: int, description: str) -> Progress:
        return Progress(total, initial, description, enabled=dist.get_rank() == 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, with the phases' times and peaks of memory, each of the rank that it was largest on.

        Collective. `step_tokens` and `step_flops`, where a trainer gives them, become rates by the time of its phase "step".
        """
        phases = largest(self.timer.take())
        self._peak = max([self._peak, *(value for name, value in phases.items() if name.startswith("memory/"))])
        line = {**metrics, **phases, "memory/peak_bytes": self._peak}
        if "time/resharding_s" in line:
            line["time/resharding_share"] = line["time/resharding_s"] / max(line["time/step_s"], 1e-9)
        for name, rate in (("step_tokens", "throughput/tokens_per_s"), ("step_flops", "throughput/model_flops_per_s")):
            if name in line:
                line[rate] = line.pop(name) / max(line["time/step_s"], 1e-9)
        self.metrics.log(step, line)

    def close(self) -> None:
        """Close the files and write the report."""
        if not self._stops:  # a job that is being stopped may be signalled again
            self.interruption.ignore()
        self.metrics.close()
        self.samples.close()
        if dist.get_rank() == 0:
            log.info("report: %s", write_report(self.folder))
        dist.barrier()


def _synchronize() -> None:
    torch.cuda.synchronize()


def _require_writable(folder: Path) -> None:
    probe = folder / f".writable_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written: {error.strerror}") from error
