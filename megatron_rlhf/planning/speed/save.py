"""What a checkpoint costs: bytes, seconds, memory while it is written, and how often one pays (Young 1974, Daly 2006)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.state import trained_bytes


@dataclass(frozen=True)
class SavedModel:
    """A trained model in a checkpoint."""

    placed: PlacedModel
    average: bool

    @property
    def bytes(self) -> float:
        """In the checkpoint: weights, optimizer state, and the moving average, fp32 where it trains."""
        return sum(self._by_stage) * self.placed.parallel.tensor

    def host_bytes(self, rank: int) -> float:
        """That a rank copies to its host's memory: its part of the model, of which each copy takes a share."""
        if rank not in self.placed.ranks:
            return 0.0
        return self._by_stage[self.placed.stage_of(rank)] / self.placed.data

    def gpu_bytes(self, rank: int) -> float:
        """On a rank's GPU while it is written: the moving average, gathered from its shards."""
        if rank not in self.placed.ranks or not self.average or not self.placed.parallel.distributed_optimizer:
            return 0.0
        return FP32 * self.placed.trained_parameters(self.placed.stage_of(rank))

    @functools.cached_property
    def _by_stage(self) -> list[float]:
        """Of one copy's rank of each stage: nothing is divided over data parallelism."""
        whole = self.placed.with_parallel(distributed_optimizer=False)
        held = [trained_bytes(whole, stage, self.average) for stage in range(whole.parallel.pipeline)]
        written = [kinds["weights"] + kinds["optimizer"] + kinds.get("ema", 0.0) for kinds in held]
        if not self.average:
            return written
        # The average is written as a whole model, with the weights that do not train.
        frozen = [whole.parameters(s) - whole.trained_parameters(s) for s in range(whole.parallel.pipeline)]
        return [size + count * whole.element for size, count in zip(written, frozen, strict=True)]


@dataclass(frozen=True)
class PlannedSave:
    """A checkpoint of a run."""

    models: Sequence[SavedModel]
    cluster: ClusterConfig
    in_background: bool

    @property
    def bytes(self) -> float:
        return sum(model.bytes for model in self.models)

    @property
    def seconds(self) -> float:
        """That training waits: for the copy to host memory, and without async_save for the disk."""
        most = max(self.host_bytes(rank) for rank in self._ranks())
        seconds = most / self.cluster.host_rate
        if not self.in_background:
            seconds += self.bytes / ((self.cluster.nodes or 1) * self.cluster.storage_gb_per_s * 1e9)
        return seconds

    def host_bytes(self, rank: int) -> float:
        """Roles are written one after the other, but copied all at once for the background."""
        copies = [model.host_bytes(rank) for model in self.models]
        return sum(copies) if self.in_background else max(copies)

    def gpu_bytes(self, rank: int) -> float:
        return max(model.gpu_bytes(rank) for model in self.models)

    def _ranks(self) -> set[int]:
        return {rank for m in self.models for rank in m.placed.ranks[:: m.placed.gpus // m.placed.parallel.pipeline]}


def seconds_between_saves(save_seconds: float, seconds_between_failures: float) -> float:
    """Computing time between checkpoints that loses least to saving and to work that is done again (Daly's equation 37)."""
    ratio = save_seconds / (2 * seconds_between_failures)
    if ratio >= 1:
        return seconds_between_failures
    return (
        math.sqrt(2 * save_seconds * seconds_between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds
    )


def steps_between_saves(step_seconds: float, save_seconds: float, cluster: ClusterConfig) -> int:
    """`run.save_every=auto`."""
    between_failures = 3600 * cluster.gpu_hours_per_failure / cluster.gpus
    return max(1, round(seconds_between_saves(save_seconds, between_failures) / step_seconds))
