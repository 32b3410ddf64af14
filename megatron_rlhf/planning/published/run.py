"""Runs whose speed others have published, as the planner sees them: how far its seconds can be trusted (docs/planner.md)."""

from dataclasses import dataclass, field
from enum import Enum

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.placement import PlacedModel
from megatron_rlhf.planning.speed.execution import Execution
from megatron_rlhf.planning.speed.timing import Batch, schedule_seconds, update_seconds


class Unit(Enum):
    """How a source states speed; its FLOPs count attention as if nothing were masked, unless it says `causal`."""

    seconds = "s"
    tflops = "TFLOP/s"
    causal_tflops = "TFLOP/s, causal"
    tflops_recomputed = "TFLOP/s, recomputation counted"
    mfu = "% MFU"


@dataclass(frozen=True)
class PublishedRun:
    """One row of somebody's table."""

    name: str
    source: str
    cluster: str
    """A file of conf/cluster/."""
    gpus: int
    model: ModelConfig
    parallel: ParallelConfig
    batch_size: int
    micro_batch_size: int
    length: int
    value: float
    unit: Unit
    execution: Execution = field(default_factory=Execution)
    precision: Precision = Precision.bf16

    @property
    def placed(self) -> PlacedModel:
        return PlacedModel(self.model, self.parallel, self.precision, self.gpus, execution=self.execution)

    def planned_seconds(self, cluster: ClusterConfig) -> float:
        """The planner's seconds of one step."""
        placed = self.placed
        microbatches = self.batch_size // placed.data // self.micro_batch_size
        batch = Batch(microbatches, self.micro_batch_size * self.length, self.length)
        return sum(schedule_seconds(placed, cluster, [batch], backward=True)) + update_seconds(
            placed, cluster, beside=batch
        )

    def planned(self, cluster: ClusterConfig) -> float:
        """The planner's figure in the source's unit."""
        seconds = self.planned_seconds(cluster)
        if self.unit is Unit.seconds:
            return seconds
        rate = self._counted_flops() / seconds / self.gpus
        return 100 * rate / cluster.peak_flops_per_s(self.precision) if self.unit is Unit.mfu else rate / 1e12

    def _counted_flops(self) -> float:
        """FLOPs of a step as the source counts them."""
        model, tokens = self.model, self.batch_size * self.length
        layers = 6 * parameters.matmul_parameters(model, scalar=True)
        attention = 12.0 * model.num_layers * parameters.attention_width(model) * self.length
        attention *= 0.5 if self.unit is Unit.causal_tflops else 1.0
        passes = 4 / 3 if self.unit is Unit.tflops_recomputed else 1.0
        return tokens * (passes * (layers + attention) + 6 * model.hidden_size * model.vocab_size)
