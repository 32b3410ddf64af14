"""The moving average of the policy's weights."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rlhf.models.roles import Role
from megatron_rlhf.trainers.masters import Master, masters_of


@dataclass
class MovingAverage:
    """Exponential moving average of a role's weights, in fp32 (InstructGPT, appendix C.4: decay 0.992).

    It follows the optimizer's master weights: in half precision the model's own weights are rounded, and small updates
    would leave most of them, and an average of them, unchanged. Where the distributed optimizer shards the masters over
    data parallelism, each rank averages its shard.
    """

    role: Role
    optimizer: MegatronOptimizer | None
    decay: float
    shadows: list[dict[str, Tensor]] = field(default_factory=list)
    """For each chunk, by the names of its parameters: the average of what this rank's optimizer owns of them."""

    def __post_init__(self) -> None:
        self.shadows = [{name: m.values().clone() for name, m in chunk.items()} for chunk in self._masters()]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        for masters, shadow in zip(self._masters(), self.shadows, strict=True):
            for name, master in masters.items():
                shadow[name].lerp_(master.values(), 1 - self.decay)

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[Role]:
        """The role, named `..._ema`, with the average (fp32) in place of its weights: to save, load, sample. Collective.

        A sharded average is gathered inside the block; what is loaded into it is sharded again afterwards.
        """
        current = [{name: p.data for name, p in _trained(chunk).items()} for chunk in self.role.modules]
        whole = self._gathered()
        self._point_to(whole)
        try:
            yield dataclasses.replace(self.role, name=f"{self.role.name}_ema")
        finally:
            self._point_to(current)
            for masters, shadow, chunk in zip(self._masters(), self.shadows, whole, strict=True):
                for name, master in masters.items():
                    shadow[name].copy_(master.part_of(chunk[name]))

    def _masters(self) -> list[dict[str, Master]]:
        return masters_of(self.role, self.optimizer)

    @torch.no_grad()
    def _gathered(self) -> list[dict[str, Tensor]]:
        """The average of whole parameters, in this rank's part of the model."""
        if not self.role.layout.config.distributed_optimizer:
            return self.shadows
        result = []
        for chunk, masters, shadow in zip(self.role.modules, self._masters(), self.shadows, strict=True):
            whole = {}
            for name, parameter in _trained(chunk).items():
                whole[name] = torch.zeros_like(parameter, dtype=torch.float32)
                if name in masters:
                    masters[name].part_of(whole[name]).copy_(shadow[name])
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
