"""fp8 of a live model: switching it off and on again, and adapting it to decoding.

Megatron-Core asks `config.fp8` (for nvfp4 `config.fp4`) at every forward pass whether to enter Transformer Engine's context,
which alone makes the layers' matrix products fp8: the weights themselves stay in bf16. So one field switches all parts of a
chunk.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlhf.config.model import Fp8Recipe
from megatron_rlhf.models.gpt import FP4_FORMAT, FP8_FORMAT

# Megatron-Core marks Transformer Engine's linear layers with this flag: on the first microbatch of a schedule they cast
# their weights to fp8, on the others they read what they kept.
_CASTS_WEIGHTS = "is_first_microbatch"


def is_on(modules: Sequence[GPTModel]) -> bool:
    """Whether the next forward pass computes in fp8."""
    return bool(modules) and any(getattr(modules[0].config, field, None) is not None for field in ("fp8", "fp4"))


def switch(modules: Sequence[GPTModel], on: bool) -> None:
    """Takes effect with the next forward pass; not to be called between a forward and its backward pass."""
    for module in modules:
        if module.config.fp8_recipe == Fp8Recipe.nvfp4.value:
            module.config.fp4 = FP4_FORMAT if on else None
        else:
            module.config.fp8 = FP8_FORMAT if on else None


@contextlib.contextmanager
def switched(modules: Sequence[GPTModel], on: bool) -> Iterator[None]:
    """The same, within a `with` block."""
    before = is_on(modules)
    switch(modules, on)
    try:
        yield
    finally:
        switch(modules, before)


def token_multiple(modules: Sequence[GPTModel]) -> int:
    """Tokens of a forward pass must be a multiple of this."""
    return Fp8Recipe(modules[0].config.fp8_recipe).multiple if is_on(modules) else 1


@contextlib.contextmanager
def decoding(chunks: Sequence[torch.nn.Module], multiple: int) -> Iterator[None]:
    """For many small forward passes with the same weights: any number of tokens, and weights cast to fp8 once.

    Only inside `torch.no_grad()`, and without sequence parallelism.

    Args:
        chunks: as passed to the schedules.
        multiple: tokens that enter a linear layer are padded with zeros to a multiple of this; the padding is removed
            from the output.
    """
    layers = [layer for chunk in chunks for layer in chunk.modules() if hasattr(layer, _CASTS_WEIGHTS)]
    padding = _TokenPadding(multiple)
    hooks = [layer.register_forward_pre_hook(padding.add) for layer in layers]
    hooks += [layer.register_forward_hook(padding.take_off) for layer in layers]
    for layer in layers:
        setattr(layer, _CASTS_WEIGHTS, True)
    for chunk in chunks:  # so that the schedules find no layer to make cast again
        chunk.modules_with_is_first_microbatch = []  # type: ignore[assignment]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for chunk in chunks:
            del chunk.modules_with_is_first_microbatch


class _TokenPadding:
    """Hooks of linear layers [s, b, h] -> ([s, b, o], bias)."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.shape = torch.Size()

    def add(self, layer: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (input_sbh,) = inputs
        self.shape = input_sbh.shape[:-1]
        flat = input_sbh.reshape(-1, 1, input_sbh.shape[-1])
        return (torch.nn.functional.pad(flat, (0, 0, 0, 0, 0, -len(flat) % self.multiple)),)

    def take_off(self, layer: torch.nn.Module, inputs: tuple[Tensor], outputs: tuple) -> tuple:
        output, *rest = outputs
        return (output[: self.shape.numel()].view(*self.shape, output.shape[-1]), *rest)
