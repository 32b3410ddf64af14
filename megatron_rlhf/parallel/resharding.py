"""Weights of a model at one layout into a copy of it at another, by Megatron-Core's resharding."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core.resharding.refit import swap_model_weights

from megatron_rlhf.parallel.layout import ParallelLayout


def copy_weights(
    source: Sequence[torch.nn.Module], layout: ParallelLayout, target: Sequence[torch.nn.Module], to: ParallelLayout
) -> None:
    """Fill the chunks `target` at layout `to` with the weights of `source` at `layout`. Collective over the world.

    Both layouts are plain stages over the same ranks; ranks outside them have no chunks. The plan of who sends what to whom
    is made once for each pair of models.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    swap_model_weights([*source, _Absent(layout)][:1], [*target, _Absent(to)][:1], backend)


class _Absent(torch.nn.Module):
    """A model without weights: what a rank outside a layout brings to Megatron-Core's plan, which all ranks make together."""

    def __init__(self, layout: ParallelLayout) -> None:
        super().__init__()
        self.pg_collection = layout.groups
        self.config = SimpleNamespace(num_moe_experts=None)
