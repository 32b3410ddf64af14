"""Megatron-Core's parallel linear layers with the plain product when no gradient is needed.

Their own product, and the copy and sum over tensor-parallel ranks around it, are autograd functions. When a token is
decoded, their overhead is as large as a small product itself.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """[s, b, h] -> [s, b, this rank's part of the output], and the bias where it is added later."""

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.sequence_parallel or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        if self.skip_bias_add:
            return F.linear(input_, self.weight), self.bias
        return F.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """[s, b, this rank's part of the input] -> [s, b, h], and the bias where it is added later."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.tp_group.size() > 1 or not self.skip_bias_add:
            return super().forward(input_)
        return F.linear(input_, self.weight), self.bias
