"""Which ranks hold which roles, and the layout of a copy of the policy that samples."""

from dataclasses import dataclass
from enum import Enum

from megatron_rlhf.config.model import ParallelConfig


class PlacementKind(Enum):
    """Whether the critic's roles share the policy's ranks."""

    colocated = "colocated"
    disaggregated = "disaggregated"


@dataclass(kw_only=True)
class PlacementConfig:
    """Which ranks hold which roles. The numbers are the same either way."""

    kind: PlacementKind = PlacementKind.colocated
    """colocated: every rank holds its part of all four roles; disaggregated: the last ranks hold reward and value model,
    which score and learn while the others continue."""
    critic_ranks: int = 0
    """disaggregated: how many ranks, the last of the job, hold reward and value model; the others hold policy and reference."""

    portions: int = 8
    """disaggregated: in about how many portions finished responses go to reward and value model, which score them while
    others are still sampled; 1: all of them at the end."""

    def ranks(self, world_size: int) -> tuple[range, range]:
        """Ranks of the policy's side, and of the critic's."""
        if self.kind is PlacementKind.colocated:
            return range(world_size), range(world_size)
        first = world_size - self.critic_ranks
        return range(first), range(first, world_size)


@dataclass(kw_only=True)
class GenerationLayoutConfig:
    """Layout of a second copy of the policy, for sampling only; keys that are not given are taken from `parallel`."""

    tensor: int | None = None
    """Ranks that split each matrix while sampling."""
    pipeline: int | None = None
    """Pipeline stages while sampling; with 1, tokens do not have to pass through several stages."""
    last_stage_layers: int | None = None
    """Layers on the last stage, if they cannot be divided evenly over the stages."""

    def of(self, training: ParallelConfig) -> ParallelConfig | None:
        """The layout to sample at; None if it is the training layout itself, so no copy is needed."""
        tensor = training.tensor if self.tensor is None else self.tensor
        pipeline = training.pipeline if self.pipeline is None else self.pipeline
        if (tensor, pipeline, 1) == (training.tensor, training.pipeline, training.context):
            return None  # one token cannot be split over context-parallel ranks
        last = self.last_stage_layers
        if last is None and pipeline == training.pipeline:
            last = training.last_stage_layers
        return ParallelConfig(tensor=tensor, pipeline=pipeline, last_stage_layers=last)
