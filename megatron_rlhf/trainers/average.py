"""The moving average of the policy's weights."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.models.roles import Role
from megatron_rlhf.trainers.masters import masters_of


@dataclass
class MovingAverage:
    """Exponential moving average of a role's weights, in fp32 (InstructGPT, appendix C.4: decay 0.992).

    It follows the optimizer's master weights: in half precision the model's own weights are rounded, and small updates
    would leave most of them, and an average of them, unchanged. It is sharded over data parallelism: where the distributed
    optimizer shards the masters, each rank averages its own, elsewhere an equal part of every parameter.
    """

    role: Role
    optimizer: MegatronOptimizer | None
    decay: float
    shadows: list[dict[str, Tensor]] = field(default_factory=list)
    """For each chunk, by the names of its parameters: the average of this rank's part, flat."""

    def __post_init__(self) -> None:
        self.shadows = [{name: values.clone() for name, (_, values) in chunk.items()} for chunk in self._owned()]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        for owned, shadow in zip(self._owned(), self.shadows, strict=True):
            for name, (_, values) in owned.items():
                shadow[name].lerp_(values, 1 - self.decay)

    def saved(self) -> SavedRole:
        """What a checkpoint holds: each rank its part, under the role's name with `_ema`."""
        average = [
            {name: (start, shadow[name]) for name, (start, _) in owned.items()}
            for owned, shadow in zip(self._owned(), self.shadows, strict=True)
        ]
        return SavedRole(dataclasses.replace(self.role, name=f"{self.role.name}_ema"), average=average)

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[Role]:
        """The role, named `..._ema`, with the average (fp32), gathered, in place of its weights. Collective."""
        current = [{name: p.data for name, p in _trained(chunk).items()} for chunk in self.role.modules]
        self._point_to(self._gathered())
        try:
            yield dataclasses.replace(self.role, name=f"{self.role.name}_ema")
        finally:
            self._point_to(current)

    def _owned(self) -> list[dict[str, tuple[int, Tensor]]]:
        """For each chunk, by name of every parameter that trains: where this rank's part begins, and its master weights."""
        group = self.role.layout.groups.dp_cp
        result: list[dict[str, tuple[int, Tensor]]] = []
        for chunk, masters in zip(self.role.unwrapped, masters_of(self.role, self.optimizer), strict=True):
            result.append({})
            for name, parameter in _trained(chunk).items():
                master = masters.get(name)
                if master is None:  # other ranks own all of it
                    result[-1][name] = 0, parameter.data.new_empty(0, dtype=torch.float32)
                elif master.rows is not None:
                    result[-1][name] = master.rows.start, master.values()
                else:
                    values = master.values().view(-1)
                    first, last = (len(values) * rank // group.size() for rank in (group.rank(), group.rank() + 1))
                    result[-1][name] = first, values[first:last]
        return result

    @torch.no_grad()
    def _gathered(self) -> list[dict[str, Tensor]]:
        """The average of whole parameters, in this rank's part of the model."""
        result = []
        for chunk, owned, shadow in zip(self.role.modules, self._owned(), self.shadows, strict=True):
            whole = {}
            for name, parameter in _trained(chunk).items():
                start = owned[name][0]
                whole[name] = torch.zeros_like(parameter, dtype=torch.float32)
                whole[name].view(-1)[start : start + len(shadow[name])] = shadow[name]
                # Bits are added to zeros: exact, including signs of zeros.
                dist.all_reduce(whole[name].view(torch.int32), group=self.role.layout.groups.dp_cp)
            result.append(whole)
        return result

    def _point_to(self, weights: list[dict[str, Tensor]]) -> None:
        for chunk, tensors in zip(self.role.modules, weights, strict=True):
            for name, parameter in _trained(chunk).items():
                parameter.data = tensors[name]


def _trained(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Frozen weights are their own average."""
    return {name: parameter for name, parameter in chunk.named_parameters() if parameter.requires_grad}
