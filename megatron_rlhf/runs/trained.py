"""What a checkpoint takes of a role that is being trained."""

from contextlib import AbstractContextManager
from typing import Protocol

from megatron.core.optimizer import MegatronOptimizer

from megatron_rlhf.models.roles import Role


class Average(Protocol):
    """A moving average of a role's weights."""

    def as_weights(self) -> AbstractContextManager[Role]:
        """The role with the average in place of its weights, under a name of its own."""
        ...


class Trained(Protocol):
    """A role with its optimizer and its average, if there is one."""

    @property
    def role(self) -> Role: ...
    @property
    def optimizer(self) -> MegatronOptimizer | None: ...
    @property
    def average(self) -> Average | None: ...
