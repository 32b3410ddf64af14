"""One update of one role: accumulate over microbatches, clip, Adam; non-finite updates are skipped."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_rlhf.config.errors import RunFailed
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.offload import storage_of
from megatron_rlhf.parallel.pipeline import Microbatch, Statistics, forward_backward
from megatron_rlhf.runs.guards import Guard
from megatron_rlhf.trainers.average import MovingAverage
from megatron_rlhf.trainers.gradients import Comparison, KeptGradient
from megatron_rlhf.trainers.masters import masters_of
from megatron_rlhf.trainers.optimizer import gather_weights, keep_weights, unreduced, wrap

log = logging.getLogger(__name__)


class TrainingDiverged(RunFailed):
    """Too many updates in a row had a non-finite loss or gradient."""


@dataclass
class Update:
    """What one update did. `statistics` are global: summed over microbatches and data-parallel ranks."""

    statistics: dict[str, float]
    grad_norm: float
    skipped: bool
    gradients: Comparison | None = None
    """The part accumulated first compared with the rest, where that part's gradient was kept."""


@dataclass(frozen=True)
class Accumulated:
    """Microbatches whose gradients are in the buffers already, and their statistics."""

    microbatches: Sequence[Microbatch] = ()
    statistics: Sequence[Statistics] = ()
    kept: KeptGradient | None = None
    """A copy of their gradient, to compare the rest with."""


@dataclass
class TrainedRole:
    """A role with gradients and an optimizer. Losses arrive divided by global counts: gradients are summed, not averaged."""

    role: Role
    optimizer: MegatronOptimizer | None
    """None on ranks outside the role's layout."""
    max_skipped: int
    average: MovingAverage | None = None
    skipped_in_a_row: int = 0
    guard: Guard | None = None
    """Gets a report of every skipped update."""

    @classmethod
    def create(
        cls,
        role: Role,
        config: OptimizerConfig,
        precision: Precision,
        max_skipped: int = 5,
        ema_decay: float = 0.0,
    ) -> "TrainedRole":
        """Wrap the role's chunks and build the optimizer for them. Collective."""
        optimizer = wrap(role, config, precision)
        average = MovingAverage(role, optimizer, ema_decay) if ema_decay else None
        return cls(role, optimizer, max_skipped, average)

    def accumulate(self, microbatches: Sequence[Microbatch], keep: bool = False) -> Accumulated:
        """Gradients of a first part of the next update, in a separate schedule, not yet reduced over ranks.

        Args:
            keep: also copy the gradient, so that the update can tell its two parts apart.
        """
        if self.optimizer is None:
            return Accumulated()
        self._clear_gradients()
        with unreduced(self.role):
            statistics = forward_backward(self.role.chunks, microbatches, self.role.layout)
        return Accumulated(microbatches, statistics, KeptGradient.of(self.role) if keep else None)

    def update(self, microbatches: Sequence[Microbatch], lr: float, after: Accumulated | None = None) -> Update:
        """One optimizer step on the sum of the microbatches' losses; nothing, and no statistics, on other ranks.

        Args:
            lr: learning rate of this step.
            after: what `accumulate` returned, if it has done a part of this update.
        """
        layout = self.role.layout
        if self.optimizer is None:
            return Update({}, 0.0, False)
        if after is None:
            after = Accumulated()
            self._clear_gradients()
        statistics = [*after.statistics, *forward_backward(self.role.chunks, microbatches, layout)]
        totals = collectives.reduce_statistics(statistics, layout)
        with layout:
            grad_norm, skipped, gradients = self._apply_gradients(lr, loss_is_finite(totals), after.kept)
            (keep_weights if skipped else gather_weights)(self.role)
        # In fp16 gradients overflow now and then: the loss scale is lowered, nothing else is needed.
        by_scale = self.optimizer.chained_optimizers[0].config.fp16 and all(map(math.isfinite, totals.values()))
        if skipped and self.guard is not None and not by_scale:
            self.guard.report_update(self.role, [*after.microbatches, *microbatches], statistics, totals)
        self._count_skips(skipped, grad_norm, totals)
        if self.average is not None and not skipped:
            self.average.update()
        return Update(totals, grad_norm, skipped, gradients)

    def share(self, updates: list[Update]) -> list[Update]:
        """Send what the role's ranks know of its updates to all ranks of the world. Collective over the world."""
        updates, self.skipped_in_a_row = collectives.publish_object((updates, self.skipped_in_a_row), self.role.layout)
        return updates

    @torch.no_grad()
    def add_to(self, name: str, amount: float) -> None:
        """Change the weights called `name` outside an update: the model's, and only their masters in the optimizer."""
        for chunk, masters in zip(self.role.modules, masters_of(self.role, self.optimizer), strict=True):
            for parameter in (p for n, p in chunk.named_parameters() if n == name):
                parameter.add_(amount)
            if name in masters:
                masters[name].add(amount)

    def optimizer_tensors(self) -> list[Tensor]:
        """Master weights, moments and the moving average: what only an update needs."""
        if self.optimizer is None:
            return []
        weights = {storage_of(parameter) for chunk in self.role.unwrapped for parameter in chunk.parameters()}
        tensors = [tensor for shadow in self.average.shadows for tensor in shadow.values()] if self.average else []
        for part in self.optimizer.chained_optimizers:
            # In fp32 the optimizer works on the model's own weights, or on views of them.
            tensors += [p for group in part.param_groups for p in group["params"] if storage_of(p) not in weights]
            tensors += [t for state in part.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return tensors

    def _clear_gradients(self) -> None:
        assert self.optimizer is not None
        for chunk in self.role.chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _apply_gradients(
        self, lr: float, loss_is_finite: bool, kept: KeptGradient | None
    ) -> tuple[float, bool, Comparison | None]:
        optimizer = self.optimizer
        assert optimizer is not None
        for part in optimizer.chained_optimizers:
            for group in part.param_groups:
                group["lr"] = lr
                # A checkpoint restores those that it was saved with.
                group["betas"] = part.config.adam_beta1, part.config.adam_beta2
                group["eps"] = part.config.adam_eps
                # Megatron-Core leaves it to its scheduler to exempt biases and norms.
                group["weight_decay"] = part.config.weight_decay * group["wd_mult"]
        scale = float(optimizer.get_loss_scale()) if kept else 1.0  # before it is adapted
        overflow = optimizer.prepare_grads()
        grad_norm = float("inf") if overflow else float(optimizer.get_grad_norm())
        if not math.isfinite(grad_norm) or not loss_is_finite:
            return grad_norm, True, None
        gradients = kept.compare(optimizer, scale) if kept else None
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if part.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
        return grad_norm, False, gradients

    def _count_skips(self, skipped: bool, grad_norm: float, statistics: dict[str, float]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        bad = [f"{name} = {value}" for name, value in statistics.items() if not math.isfinite(value)]
        cause = f"{self.role.name}: gradient norm {grad_norm}" + (f"; {', '.join(bad)}" if bad else "")
        log.warning("update skipped, %s (%d in a row)", cause, self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} updates in a row were skipped (run.max_skipped_steps={self.max_skipped}); {cause}. "
                "Lower the learning rate, or look at the data of these steps."
            )


def loss_is_finite(statistics: Mapping[str, float]) -> bool:
    """True if every loss is finite. The gradient alone does not show it: that of a constant NaN is 0."""
    return all(math.isfinite(value) for name, value in statistics.items() if name.endswith("loss"))
