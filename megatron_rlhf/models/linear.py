"""Megatron-Core's parallel linear layers with the plain product where there is no gradient to take care of.

Their own product is an autograd function that arranges for gradients. When a token is decoded it costs as much as a small
product itself.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """[s, b, h] -> [s, b, this rank's part of the output]."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled() or kwargs["sequence_parallel"]:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return F.linear(input, weight, kwargs["bias"])


class RowLinear(RowParallelLinear):
    """[s, b, this rank's part of the input] -> [s, b, h], not yet summed over ranks."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled():
            return super()._forward_impl(input, weight, *args, **kwargs)
        return F.linear(input, weight)
