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
    which score and learn while the others go on."""
    critic_ranks: int = 0
    """disaggregated: ranks, the last of the job, that hold reward and value model; the others hold policy and reference."""

    def ranks(self, world_size: int) -> tuple[range, range]:
        """Ranks of the policy's side, and of the critic's."""
        if self.kind is PlacementKind.colocated:
            return range(world_size), range(world_size)
        first = world_size - self.critic_ranks
        return range(first), range(first, world_size)


@dataclass(kw_only=True)
class GenerationLayoutConfig:
    """Layout of a second copy of the policy, for sampling alone; keys that are not given are those of `parallel`."""

    tensor: int | None = None
    """Ranks that split each matrix while sampling."""
    pipeline: int | None = None
    """Stages while sampling; 1 spares a token its way through the stages."""
    last_stage_layers: int | None = None
    """Layers on the last stage, where they do not divide."""

    def of(self, training: ParallelConfig) -> ParallelConfig | None:
        """The layout to sample at; None where it is the training layout itself, and no copy is needed."""
        tensor = training.tensor if self.tensor is None else self.tensor
        pipeline = training.pipeline if self.pipeline is None else self.pipeline
        if (tensor, pipeline, 1) == (training.tensor, training.pipeline, training.context):
            return None  # one token cannot be shared out over a context
        last = self.last_stage_layers
        if last is None and pipeline == training.pipeline:
            last = training.last_stage_layers
        return ParallelConfig(tensor=tensor, pipeline=pipeline, last_stage_layers=last)
