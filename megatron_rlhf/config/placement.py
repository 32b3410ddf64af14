"""Which ranks hold PPO's roles."""

from dataclasses import dataclass
from enum import Enum


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
