"""Master weights: what the optimizer really updates. In half precision the model's own are a rounded copy.

What must follow training exactly (a moving average, a correction of a weight) uses these.
"""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_rlhf.models.roles import Role


@dataclass(frozen=True)
class Master:
    """The part of a parameter that this rank's optimizer owns."""

    parameter: Tensor
    rows: slice | None
    """Of the flattened parameter, where the distributed optimizer shards it; None: all of it."""

    def part_of(self, whole: Tensor) -> Tensor:
        """The same part of a tensor that is shaped like the parameter; a view."""
        return whole if self.rows is None else whole.view(-1)[self.rows]

    def values(self) -> Tensor:
        """The master weights themselves, fp32."""
        if self.parameter.dtype is torch.float32:
            return self.part_of(self.parameter.data)
        return self.parameter.main_param.data  # type: ignore[attr-defined]

    def add(self, amount: float) -> None:
        """Change the master weights, not the rounded copy, outside an update."""
        if self.parameter.dtype is not torch.float32:
            self.values().add_(amount)


def masters_of(role: Role, optimizer: MegatronOptimizer | None) -> list[dict[str, Master]]:
    """For each chunk of the role, by parameter name; only those that train and that this rank owns a part of."""
    return [
        {name: master for name, p in chunk.named_parameters() if (master := _master(p, optimizer)) is not None}
        for chunk in role.unwrapped
    ]


def _master(parameter: Tensor, optimizer: MegatronOptimizer | None) -> Master | None:
    assert optimizer is not None, "a role with chunks on this rank has an optimizer here"
    if not parameter.requires_grad:
        return None  # a parameter without an optimizer has no other copy
    sharded = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    if not sharded:
        return Master(parameter, None)
    for part in sharded:
        if parameter in part.model_param_gbuf_map:
            buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
            owned = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            return Master(parameter, slice(owned.start, owned.end))
    return None  # other ranks own all of it
