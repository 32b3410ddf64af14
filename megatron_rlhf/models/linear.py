"""Megatron-Core's parallel linear layers with fewer passes over memory, where one rank holds the whole layer.

The bias is added by the product, and the weight's gradient is added to Megatron-Core's buffer by the product that makes it:
each would otherwise be a pass of its own over all activations or weights. When no gradient is needed, the plain product also
replaces their autograd functions, whose overhead is as large as a small product when a token is decoded.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """[s, b, h] -> [s, b, this rank's part of the output], and the bias where it is added later."""

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if self.sequence_parallel or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        # A kernel that fuses bias and activation wants the bias.
        left = self.bias if self.skip_bias_add and self.config.bias_activation_fusion else None
        bias = self.bias if left is None else None
        if not torch.is_grad_enabled():
            return F.linear(input_, self.weight, bias), left
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _Product.apply(input_, self.weight, bias), left


class RowLinear(RowParallelLinear):
    """[s, b, this rank's part of the input] -> [s, b, h], and the bias where it is added later."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        product = _Product.apply if torch.is_grad_enabled() else F.linear
        return product(input_, self.weight, self.bias), None


class _Product(torch.autograd.Function):
    """input @ weight.T + bias."""

    @staticmethod
    def forward(ctx, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_, weight)
        return F.linear(input_, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input_, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_no, input_ni = grad.reshape(-1, grad.shape[-1]), input_.reshape(-1, input_.shape[-1])
        grad_weight = None
        if needs_weight:
            buffer = getattr(weight, "main_grad", None)
            if buffer is not None and buffer.dtype is weight.dtype:
                buffer.addmm_(grad_no.t(), input_ni)
                # Nothing is left for the hook that would add it, but it must see a gradient to know that this one is there.
                weight.grad_added_to_main_grad = True
                grad_weight = torch.empty_like(weight)
            else:
                grad_weight = grad_no.t().mm(input_ni)
        grad_bias = grad_no.sum(dim=0) if needs_bias else None
        return grad.matmul(weight) if needs_input else None, grad_weight, grad_bias
