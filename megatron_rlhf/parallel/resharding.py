"""Weights of a model at one layout into a copy of it at another, by Megatron-Core's resharding."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.resharding.refit import swap_model_weights


class WeightCopy:
    """Fills the chunks `target` with the weights of `source` whenever it is called. Collective over the world.

    Both are plain stages over the same ranks; ranks outside them have no chunks. The plan of who sends what to whom is made
    at the first call.
    """

    def __init__(self, source: Sequence[torch.nn.Module], target: Sequence[torch.nn.Module]) -> None:
        self._source, self._target = ([*chunks, _Absent()][:1] for chunks in (source, target))

    def __call__(self) -> None:
        swap_model_weights(self._source, self._target, "nccl" if torch.cuda.is_available() else "gloo")


class _Absent(torch.nn.Module):
    """A model without weights: what a rank outside a layout brings to Megatron-Core's plan, which all ranks make together."""

    def __init__(self) -> None:
        super().__init__()
        self.pg_collection = SimpleNamespace(dp=dist.group.WORLD)  # has to be some group; nothing is asked of it
        self.config = SimpleNamespace(num_moe_experts=None)
