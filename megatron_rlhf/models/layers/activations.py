"""GELU's approximation by tanh (Hendrycks & Gimpel 2016, section 2), from the fastest functions that a CPU has."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _SLOPE
_WORTH_FOUR_PASSES = 2**18
"""Numbers from which four passes of cheap functions take less time than one with tanh."""


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), of any shape.

    That is x * sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3)), and on a CPU torch's sigmoid takes a third of the time of its tanh.
    """
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.numel() < _WORTH_FOUR_PASSES:
        return F.gelu(x, approximate="tanh")
    return _GeluTanh.apply(x)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.addcmul(x.new_tensor(_SLOPE), x, x, value=_CUBIC).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
