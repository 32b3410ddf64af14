"""What every run needs in addition to its algorithm: folder, logs, metrics, checkpoints, progress, report."""

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_rlhf.checkpoint import naming, sharded
from megatron_rlhf.checkpoint.integrity import NotWritten
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import Interrupted, UserError
from megatron_rlhf.config.stages import BaseConfig
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.monitoring.files import replacing
from megatron_rlhf.monitoring.logs import setup_logging
from megatron_rlhf.monitoring.memory import peak_bytes
from megatron_rlhf.monitoring.metrics import MetricsLogger, SamplesLogger
from megatron_rlhf.monitoring.mirrors import Services
from megatron_rlhf.monitoring.progress import PhaseTimer, Progress
from megatron_rlhf.monitoring.report import write_report
from megatron_rlhf.parallel.accelerators import describe_accelerators
from megatron_rlhf.parallel.collectives import Largest, first_message
from megatron_rlhf.runs import candidates, resume_table
from megatron_rlhf.runs.checkpoints import CheckpointWriter, choose_checkpoint
from megatron_rlhf.runs.guards import Guard
from megatron_rlhf.runs.interruption import Interruption
from megatron_rlhf.runs.peak import peak_flops_per_s, with_rates
from megatron_rlhf.runs.profile import Profile, phase_range
from megatron_rlhf.runs.run_lock import RunLock, require_writable
from megatron_rlhf.runs.stage import EVALUATION, folder_for, write_stage
from megatron_rlhf.runs.trained import Trained
from megatron_rlhf.runs.watching.waiting import Waiting

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A run and its folder. All ranks call the same methods; one rank writes."""

    config: RunConfig
    stage: str
    folder: Path
    """run.dir, or a folder inside it for the evaluation of a run."""
    metrics: MetricsLogger
    samples: SamplesLogger
    resume_from: Path | None
    lock: RunLock
    writer: CheckpointWriter
    resolved_config: str
    settings: dict[str, Any]
    """What a checkpoint keeps of the configuration."""
    guard: Guard
    profile: Profile
    peak_flops_per_s: float | None
    """Of one rank, for throughput/mfu; None if it is not known."""
    timer: PhaseTimer = field(default_factory=lambda: PhaseTimer(_synchronize, peak_bytes, phase_range))
    waiting: Waiting = field(default_factory=Waiting)
    interruption: Interruption = field(default_factory=Interruption)
    content: dict[str, Any] = field(default_factory=dict)
    """What identifies models and data in a checkpoint."""
    _largest: Largest = field(default_factory=Largest)
    _stops: bool = False
    _peak: float = 0.0

    @classmethod
    def open(cls, stage: str, whole: BaseConfig, resolved_config: str) -> "Session":
        """Create the run folder (or find what to resume) and start logging.

        Raises:
            UserError: the folder cannot be written, holds another run or one of another stage, has nothing to resume,
            or a key was changed that may not change.
        """
        config = whole.run
        require_writable(Path(config.dir))
        folder = folder_for(Path(config.dir), stage)
        first = dist.get_rank() == 0
        require_writable(folder)
        lock = RunLock(folder)
        resume_from: Path | None = None
        damaged: dict[str, str] = {}
        settings: dict[str, Any] = {}
        try:
            if stage != EVALUATION:
                resume_from, damaged = choose_checkpoint(folder / "checkpoints", config)
                settings = resume_table.settings(stage, whole)
            changes = resume_table.changes(stage, settings, resume_from)
        except UserError:
            lock.release()
            raise
        dist.barrier()
        setup_logging(folder, dist.get_rank())
        for name, problem in damaged.items():
            log.warning("checkpoint %s is damaged, so the one before it is used: %s", name, problem)
        for change in changes:
            log.info(change)
        services = Services(
            wandb_project=config.wandb_project,
            wandb_entity=config.wandb_entity,
            wandb_tags=config.wandb_tags,
            mlflow_experiment=config.mlflow_experiment,
            config=yaml.safe_load(resolved_config) or {},
        )
        try:
            metrics = _connect(folder, first, services)
        except UserError:
            lock.release()
            raise
        session = cls(
            config=config,
            stage=stage,
            folder=folder,
            metrics=metrics,
            samples=SamplesLogger(folder, first, metrics.mirrors),
            resume_from=resume_from,
            lock=lock,
            writer=CheckpointWriter(folder / "checkpoints", config, on_saved=lambda: write_report(folder)),
            resolved_config=resolved_config,
            settings=settings,
            guard=Guard(folder / "replay"),
            profile=Profile(config.profiled_steps(), folder, dist.get_rank()),
            peak_flops_per_s=peak_flops_per_s(config.cluster, whole.precision),
        )
        if stage != EVALUATION:  # it has nothing to save: a signal ends it as any program
            session.interruption.listen()
        session.waiting.start()
        log.info(describe_accelerators())
        log.info("run folder %s, %d ranks%s", folder, dist.get_world_size(), " (resumed)" if resume_from else "")
        return session

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def settle(self, whole: BaseConfig) -> None:
        """Settings that follow the models are known now: compare them, as `open` did the others, and keep them."""
        before, self.settings = self.settings, resume_table.settings(self.stage, whole)
        settled = {key: value for key, value in self.settings.items() if before[key] != value}
        for change in resume_table.changes(self.stage, settled, self.resume_from):
            log.info(change)

    def require_same(self, what: str, keys: Sequence[str], content: Any) -> None:
        """Record in checkpoints what identifies a model or data (JSON); called before anything is built.

        Raises:
            UserError: naming `keys`, where the checkpoint to resume was made with different content.
        """
        self.content[what] = content
        before = self.content_before(what)
        if self.resume_from is not None and before is not None:
            resume_table.compare_content(what, keys, before, content, self.resume_from)

    def content_before(self, what: str) -> Any:
        """What the checkpoint to resume recorded by `require_same`; None for a new run, or an older checkpoint."""
        if self.resume_from is None:
            return None
        return sharded.read_meta(self.resume_from)["state"].get("content", {}).get(what)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint records about the run in addition to the trainer's state."""
        return {"settings": self.settings, "content": self.content}

    def restore(self, roles: Sequence[Trained]) -> dict[str, Any]:
        """Load the roles from the checkpoint to resume; returns the trainer's state, {} for a new run."""
        if self.resume_from is None:
            return {}
        for trained in roles:
            sharded.load_role(self.resume_from, SavedRole(trained.role, trained.optimizer))
            if trained.average is not None:
                sharded.load_role(self.resume_from, trained.average.saved())
        state = sharded.read_meta(self.resume_from)["state"]
        log.info("resumed from %s at step %d", self.resume_from, state["step"])
        return state

    def begin(self, step: int) -> None:
        """All checks passed, `step` steps are done: from here on this run's files replace those of the previous one."""
        if dist.get_rank() == 0:
            with replacing(self.folder / "config.yaml") as file:
                file.write(self.resolved_config.encode())
            with replacing(self.folder / "command") as file:
                file.write(f"{shlex.join(sys.orig_argv)}\n".encode())
            write_stage(self.folder, self.stage)
            if self.stage != EVALUATION:
                naming.sweep(self.checkpoints)
                candidates.forget_after(self.checkpoints, step)
        self.metrics.truncate(step)
        self.samples.truncate(step)
        dist.barrier()

    def save(self, name: str, roles: Sequence[Trained], state: Mapping[str, Any], with_optimizer: bool = True) -> bool:
        """Write `checkpoints/name` with the trained roles, their averages, and the trainer's state; returns success."""
        with self.timer("save"):
            return self.writer.save(name, roles, state, with_optimizer)

    def offer(self, name: str, roles: Sequence[Trained], state: Mapping[str, Any]) -> None:
        """Save a candidate for `best`: the roles' weights, and in `state` its `figure`, the lower the better. Collective."""
        with self.timer("save"):
            candidates.offer(self.writer, name, roles, state, self.config.keep_last)

    def checkpoint(self, step: int, last_step: int, roles: Sequence[Trained], state: Callable[[], Any]) -> None:
        """Save after this step if due, the last, or the run was asked to stop; publish what is written. Collective.

        Raises:
            Interrupted: after saving, when the run was asked to stop.
            NotWritten: when the last checkpoint of the schedule cannot be written.
        """
        if self.writer.is_busy:
            with self.timer("save"):
                self.writer.publish_if_written()
        if not self.save_is_due(step, last_step):
            return
        name = f"step_{step}"
        if self.config.async_save and step < last_step and not self._stops:
            with self.timer("save"):
                self.writer.save_in_background(name, roles, state())
            return
        written = self.save(name, roles, state())
        if self._stops:
            self.close()
            went = f"saved {self.checkpoints / name}" if written else f"{name} could not be saved"
            raise Interrupted(f"asked to stop: {went}; go on with run.auto_resume=true")
        if step == last_step and not written:
            raise NotWritten(f"the run is done, but its last checkpoint {self.checkpoints / name} could not be written")

    def save_is_due(self, step: int, last_step: int) -> bool:
        """Whether to write a checkpoint after this step: it is due, or the run was asked to stop. Collective."""
        if step == last_step:
            return True
        every = self.config.save_every
        assert isinstance(every, int), "auto becomes a number before the session is opened"
        self._stops = self.interruption.agreed()
        return self._stops or (every > 0 and step % every == 0)

    def last_step(self, scheduled: int) -> int:
        """Where this process stops: the end of the schedule, or run.stop_at_step before it."""
        return min(scheduled, self.config.stop_at_step or scheduled)

    def progress(self, total: int, initial: int, description: str) -> Progress:
        return Progress(total, initial, description, enabled=dist.get_rank() == 0)

    @contextmanager
    def timed_step(self, number: int) -> Iterator[None]:
        """Around the work of a step: its time, and its trace where run.profile asks for one."""
        with self.profile.step(number), self.timer("step"):
            yield

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, with the phases' times and memory peaks, each the largest over ranks.

        Collective. `step_tokens` and `step_flops`, where a trainer gives them, become rates (`with_rates`).
        """
        mine = self.timer.take()
        phases = self._largest.of({**mine, **self.waiting.figures(mine.get("time/step_s", 0.0))})
        self._peak = max([self._peak, *(value for name, value in phases.items() if name.startswith("memory/"))])
        line = {**metrics, **self.waiting.metrics(phases), **phases, "memory/peak_bytes": self._peak}
        self.metrics.log(step, with_rates(line, self.peak_flops_per_s, dist.get_world_size()))

    def close(self) -> None:
        """Close the files and write the report."""
        self.profile.close()
        self.waiting.stop()
        self.writer.finish()
        if not self._stops:  # a job that is being stopped may get another signal
            self.interruption.ignore()
        self.metrics.close()
        self.samples.close()
        if dist.get_rank() == 0:
            log.info("report: %s", write_report(self.folder))
        dist.barrier()
        self.lock.release()


def _connect(folder: Path, first: bool, services: Services) -> MetricsLogger:
    """The logger; what one rank is told by a service ends all of them."""
    services.require()
    problem, metrics = None, None
    try:
        metrics = MetricsLogger(folder, enabled=first, services=services)
    except UserError as error:
        problem = str(error)
    if (found := first_message(problem)) is not None:
        raise UserError(found[1])
    assert metrics is not None
    return metrics


def _synchronize() -> None:
    torch.cuda.synchronize()
