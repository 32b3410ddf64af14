"""Weights of a model at one layout into a copy of it at another, by Megatron-Core's resharding."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding import execute_reshard_plan, get_or_create_service
from megatron.core.utils import unwrap_model

from megatron_rlhf.parallel import compat


class WeightCopy:
    """Fills the chunks `target` with the weights of `source` whenever it is called. Collective over the world.

    Both have non-interleaved stages over the same ranks; ranks outside them have no chunks. The plan of who sends what
    to whom is made at the first call, and belongs only to this pair: Megatron-Core's own cache distinguishes pairs only
    by their layouts.
    """

    def __init__(self, source: Sequence[torch.nn.Module], target: Sequence[torch.nn.Module]) -> None:
        self._source, self._target = (unwrap_model([*chunks, _Absent()][0]) for chunks in (source, target))
        self._plan: Any = None

    def __call__(self) -> None:
        if self._plan is None:
            self._plan = compat.plan_resharding(self._source, self._target)
        service = get_or_create_service("nccl" if torch.cuda.is_available() else "gloo")
        execute_reshard_plan(self._plan, self._source, self._target, service=service)


class _Absent(torch.nn.Module):
    """A model without weights: what a rank outside a layout contributes to Megatron-Core's plan, which all ranks make
    together."""

    def __init__(self) -> None:
        super().__init__()
        self.pg_collection = SimpleNamespace(dp=dist.group.WORLD)  # must be some group; it is not used
