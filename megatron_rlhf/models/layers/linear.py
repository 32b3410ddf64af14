"""Megatron-Core's parallel linear layers with fewer passes over memory, where one rank holds the whole layer.

The bias is added by the product, and the weight's gradient is added to Megatron-Core's buffer by the product that makes it:
each would otherwise be a pass of its own over all activations or weights. When no gradient is needed, the plain product also
replaces their autograd functions, whose overhead is as large as a small product when a token is decoded.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F

_DECODED_ROWS = 32
"""Packed weights are read fastest by products of about so many rows, and serve any number."""
_WORTH_A_KERNEL = 2**25
"""Multiplications for which oneDNN may make a kernel, which takes it 0.3 ms for each new number of rows."""
_ONEDNN_IS_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Than MKL, with weights as they are: by a tenth to a third on AMD's processors with AVX512, slower with AVX2 alone."""


def _linear(input_: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, without autograd."""
    if _ONEDNN_IS_FASTER and input_.numel() * len(weight) >= _WORTH_A_KERNEL and _onednn_serves(weight):
        return _onednn(input_, weight, bias)
    return F.linear(input_, weight, bias)


def _onednn(input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input_, weight, bias, "none", [], "")


def _onednn_serves(weight: Tensor) -> bool:
    # For other types it asks for instructions that not every processor has.
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkldnn.is_available()


class Packable(ABC):
    """Something whose weight may lie in another order while it does not change."""

    packed: Tensor | None = None
    """The weight in oneDNN's order (`packed_weights`)."""

    @abstractmethod
    def weight_to_pack(self) -> Tensor | None:
        """What decoding multiplies with just as it is, if anything."""

    def _product(self, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is None:
            return _linear(input_, weight, bias)
        return _onednn(input_, self.packed, bias)


class _Layer(Packable):
    weight: torch.nn.Parameter
    tp_group: dist.ProcessGroup

    def weight_to_pack(self) -> Tensor | None:
        return self.weight if self.tp_group.size() == 1 else None


class ColumnLinear(_Layer, ColumnParallelLinear):
    """[s, b, h] -> [s, b, this rank's part of the output], and the bias where it is added later."""

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if self.sequence_parallel or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        # A kernel that fuses bias and activation wants the bias.
        left = self.bias if self.skip_bias_add and self.config.bias_activation_fusion else None
        bias = self.bias if left is None else None
        if not torch.is_grad_enabled():
            return self._product(input_, self.weight, bias), left
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _Product.apply(input_, self.weight, bias), left


class RowLinear(_Layer, RowParallelLinear):
    """[s, b, this rank's part of the input] -> [s, b, h], and the bias where it is added later."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        if not torch.is_grad_enabled():
            return self._product(input_, self.weight, self.bias), None
        return _Product.apply(input_, self.weight, self.bias), None


class _Product(torch.autograd.Function):
    """input @ weight.T + bias."""

    @staticmethod
    def forward(ctx, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_, weight)
        return _linear(input_, weight, bias)

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
        return _linear(grad, weight.t()) if needs_input else None, grad_weight, grad_bias


@contextlib.contextmanager
def packed_weights(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """On a CPU, the order in which oneDNN reads weights, which about halves the time of a decoded token's products: they are
    bound by reading weights. No gradients, and weights must not change meanwhile. Costs their memory once more."""
    packable = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Packable)]
    try:
        for module in packable:
            await_weights(module)
            weight = module.weight_to_pack()
            if weight is not None and _onednn_serves(weight):
                module.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _DECODED_ROWS)
        yield
    finally:
        for module in packable:
            module.packed = None


def await_weights(module: torch.nn.Module) -> None:
    """Before weights are read without a call of their module: those that other ranks are still sending have arrived."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
