"""The moving average of the policy's weights."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlhf.models.roles import Role


@dataclass
class MovingAverage:
    """Exponential moving average of a role's weights, in fp32 (InstructGPT, appendix C.4: decay 0.992)."""

    role: Role
    decay: float
    shadows: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Taken before the chunks are wrapped, so that names are the model's own.
        self.shadows = [
            {name: p.detach().float().clone() for name, p in chunk.named_parameters()} for chunk in self.role.chunks
        ]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        for chunk, shadow in zip(self.role.modules, self.shadows, strict=True):
            for name, parameter in chunk.named_parameters():
                shadow[name].lerp_(parameter.float(), 1 - self.decay)

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[Role]:
        """The role, named `..._ema`, with the average itself (fp32, no copy) in place of its weights: to save, load, sample."""
        current = [{name: p.data for name, p in chunk.named_parameters()} for chunk in self.role.modules]
        self._point_to(self.shadows)
        try:
            yield dataclasses.replace(self.role, name=f"{self.role.name}_ema")
        finally:
            self._point_to(current)

    def _point_to(self, weights: list[dict[str, Tensor]]) -> None:
        for chunk, tensors in zip(self.role.modules, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.data = tensors[name]
