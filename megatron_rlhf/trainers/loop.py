"""The loop that all stages share: resume, step, log, save, and stop when asked."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron_rlhf.callbacks import Callback
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.roles import Role
from megatron_rlhf.monitoring.progress import Progress
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.packing import Tally
from megatron_rlhf.runs.fp8_gate import Fp8Gate
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers import export
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)


class Trainer(ABC):
    """What a stage implements; `run` is the same for all."""

    session: Session
    tokenizer: Tokenizer
    step: int = 0
    """Steps done."""
    callbacks: Sequence[Callback] = ()
    """What a library's user does at every step."""
    gate: Fp8Gate | None = None
    """Monitors a policy that computes in fp8."""
    description: ClassVar[str]
    """Label of the progress bar."""
    length_key: ClassVar[str]
    """The keys that decide `total_steps`."""
    figures: ClassVar[Mapping[str, str]]
    """Shown beside the progress bar: label -> metric."""

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Length of the schedule."""

    @property
    @abstractmethod
    def trained(self) -> Sequence[TrainedRole]:
        """The roles that a checkpoint holds."""

    @property
    def readers(self) -> Sequence[Role]:
        """The roles that read or sample texts in a step."""
        return [trained.role for trained in self.trained]

    @property
    def phase_parts(self) -> Mapping[str, int]:
        """Phases of a step that this rank does in several parts: name -> how many (`monitoring.progress.Phases`)."""
        return {}

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """The work of one step; returns its metrics. `self.step` is still the number of steps before it."""

    def after_step(self) -> dict[str, float]:
        """Work after a step that is not part of its time, such as validation; returns more metrics."""
        return {}

    def ends_early(self) -> str | None:
        """Why the run is over before the end of its schedule, if it is: a function of what a checkpoint holds."""
        return None

    def export(self) -> None:
        """The run is over, and its last checkpoint saved: `run.export_hf`."""
        export.export(self.session.config, self.trained[0].role.name, self.tokenizer)

    def close(self) -> None:
        """The run is over: end what it has started."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything except the roles that an exact resume needs, as JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""

    def run(self) -> None:
        """All steps, from the checkpoint if the run is resumed."""
        self._restore()
        session, last, ends = self.session, self.session.last_step(self.total_steps), self.ends_early()
        for trained in self.trained:
            trained.guard = session.guard
        for callback in self.callbacks:
            callback.begin(self)
        with session.progress(self.total_steps, self.step, self.description) as progress:
            for role in self.readers:
                role.layout.watch = self._watch(progress)
            while self.step < last and not ends:
                progress.begin_step(self.phase_parts)
                session.guard.begin(self.step + 1)
                checked = self.gate.check(self.step) if self.gate else {}
                with session.timed_step(self.step + 1):
                    metrics = self.train_step() | checked
                self.step += 1
                metrics |= self.after_step()
                metrics["throughput/padding_share"] = padding_share([role.tally for role in self.readers])
                for callback in self.callbacks:
                    metrics |= callback.step(self, metrics) or {}
                session.log(self.step, metrics)
                figures = {label: metrics[name] for label, name in self.figures.items() if name in metrics}
                progress.advance(1, **figures)
                ends = self.ends_early()
                session.checkpoint(self.step, self.step if ends else last, self.trained, self._state)
        if self.step == self.total_steps or ends:
            self.export()
        if ends:
            log.info("ended at step %d of %d: %s", self.step, self.total_steps, ends)
        for callback in self.callbacks:
            callback.end(self)
        self.close()
        session.close()

    def _watch(self, progress: Progress) -> Callable[[int, int], None] | None:
        """What the first rank's layouts tell of their work in a step goes to the screen."""
        if not progress.enabled:
            return None
        return lambda done, total: progress.inside(self.session.timer.current, done, total)

    def _state(self) -> dict[str, Any]:
        skipped = [trained.skipped_in_a_row for trained in self.trained]
        gate = self.gate.state_dict() if self.gate else None
        own = {"step": self.step, "skipped_in_a_row": skipped, "fp8_gate": gate, **self.state_dict()}
        return {**own, **self.session.kept()}

    def _restore(self) -> None:
        state = self.session.restore(self.trained)
        if state:
            self.step = state["step"]
            if self.step > self.total_steps:
                raise UserError(
                    f"{self.length_key}: {self.session.resume_from} is at step {self.step}, after the end of this schedule of "
                    f"{self.total_steps} steps; resume with a longer one, or start a new run from these weights with init_from"
                )
            for trained, skipped in zip(self.trained, state["skipped_in_a_row"], strict=True):
                trained.skipped_in_a_row = skipped
            if self.gate and state.get("fp8_gate"):
                self.gate.load_state_dict(state["fp8_gate"])
            self.load_state_dict(state)
        self.session.begin(self.step if state else -1)  # a new run discards what the folder had


def padding_share(tallies: Sequence[Tally]) -> float:
    """Of all tokens read since the last call, not counting decoding. Collective over the world."""
    counts = torch.tensor([tally.take() for tally in tallies], dtype=torch.float64).sum(dim=0)
    assert dist.group.WORLD is not None
    read, padding = collectives.sum_over(counts, dist.group.WORLD).tolist()
    return padding / max(read, 1.0)
