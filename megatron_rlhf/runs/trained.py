"""What a checkpoint stores of a role that is being trained."""

from contextlib import AbstractContextManager
from typing import Protocol

from megatron.core.optimizer import MegatronOptimizer

from megatron_rlhf.models.roles import Role


class Average(Protocol):
    """A moving average of a role's weights."""

    def as_weights(self) -> AbstractContextManager[Role]:
        """The role with the average in place of its weights, under a separate name."""
        ...


class Trained(Protocol):
    """A role with its optimizer and, if there is one, its average."""

    @property
    def role(self) -> Role: ...
    @property
    def optimizer(self) -> MegatronOptimizer | None: ...
    @property
    def average(self) -> Average | None: ...
