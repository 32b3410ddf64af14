"""GELU by its formula in double precision, and its gradients by autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_rlhf.models.layers.activations import _WORTH_FOUR_PASSES, gelu_tanh

SHAPES = pytest.mark.parametrize("rows", [3, _WORTH_FOUR_PASSES // 64 + 1], ids=["one pass", "four passes"])


def numbers(rows: int) -> torch.Tensor:
    x = 4 * torch.randn(rows, 1, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, :5] = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e-20])
    return x


@SHAPES
def test_values_are_the_formulas(rows):
    x = numbers(rows)
    exact = x.double()
    expected = exact / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    before = x.clone()
    torch.testing.assert_close(gelu_tanh(x).double(), expected, rtol=1e-5, atol=2e-6)
    assert x.equal(before)


@SHAPES
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_are_autograds(rows, strided):
    x = numbers(rows)
    x = x.repeat(1, 1, 2)[..., ::2] if strided else x
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    gelu_tanh(ours).backward(grad)
    F.gelu(theirs, approximate="tanh").backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torchs(dtype):
    x = numbers(_WORTH_FOUR_PASSES // 64).to(dtype)
    assert gelu_tanh(x).equal(F.gelu(x, approximate="tanh"))
