"""What a checkpoint stores of a role that is being trained."""

from typing import Protocol

from megatron.core.optimizer import MegatronOptimizer

from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.models.roles import Role


class Average(Protocol):
    """A moving average of a role's weights."""

    def saved(self) -> SavedRole:
        """What a checkpoint holds of it, under a name of its own."""
        ...


class Trained(Protocol):
    """A role with its optimizer and, if there is one, its average."""

    @property
    def role(self) -> Role: ...
    @property
    def optimizer(self) -> MegatronOptimizer | None: ...
    @property
    def average(self) -> Average | None: ...
