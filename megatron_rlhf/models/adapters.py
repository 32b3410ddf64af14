"""Low-rank adapters (LoRA) beside the linear layers of a chunk.

Queries, keys and values have an adapter each, and so have gate and up, though Megatron-Core keeps them in one matrix. Under
tensor parallelism the factor with the split side of its matrix is split with it, the other is on every rank; what
crosses ranks is only `rank` wide. Initial weights depend on the seed alone, not on the layout.
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_rlhf.config.lora import ROW_PARALLEL, Adapter, projections
from megatron_rlhf.config.model import ModelConfig

SUFFIX = "_adapter"
"""The adapters of `linear_qkv` are the module `linear_qkv_adapter` next to it."""


def is_adapter(name: str) -> bool:
    """Whether a weight's name is that of an adapter's."""
    return f"{SUFFIX}." in name


def fuse(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Outputs of a linear layer's projections, [..., outputs] each, in the order in which the layer has them: one after the
    other, for queries, keys and values within each group."""
    return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)


class LinearAdapter(MegatronModule):
    """The adapters of one linear layer: its input [s, b, in] -> what is added to its output [s, b, out]."""

    def __init__(
        self,
        config: TransformerConfig,
        linear: str,
        model: ModelConfig,
        adapter: Adapter,
        dropout: float,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.by_row, self.group, ranks = linear in ROW_PARALLEL, group, group.size()
        self.rank, self.scale, self.dropout = adapter.rank, adapter.scale, dropout
        self.sequence_parallel = config.sequence_parallel  # Megatron-Core switches modules with this flag
        self.groups = config.num_query_groups // ranks if linear == "self_attention.linear_qkv" else 1
        self.widths = {n: rows if self.by_row else rows // ranks for n, (rows, _) in projections(model)[linear].items()}
        self.targets = adapter.parts(linear, model)
        self.active = True
        device = torch.cuda.current_device()
        for name, (_, columns) in self.targets.items():
            a = torch.nn.Parameter(torch.empty(self.rank, columns // ranks if self.by_row else columns, device=device))
            b = torch.nn.Parameter(torch.zeros(self.widths[name], self.rank, device=device))
            split, whole, axis = (a, b, 1) if self.by_row else (b, a, 0)
            set_tensor_model_parallel_attributes(split, True, axis, 1)
            # Under sequence parallelism a rank's gradient of the whole factor is of its own tokens: it is summed over ranks.
            whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"{name}_a", a)
            self.register_parameter(f"{name}_b", b)

    def factors(self, which: str) -> list[Tensor]:
        """A or B of each adapted projection."""
        return [getattr(self, f"{name}_{which}") for name in self.targets]

    def forward(self, x_sbi: Tensor) -> Tensor:
        """Zero for projections without an adapter."""
        low_sbr = self._exchange(F.linear(self._drop(x_sbi), torch.cat(self.factors("a"))) * self.scale)
        low = low_sbr.split(self.rank, dim=-1)
        return self._fuse([F.linear(part, b) for part, b in zip(low, self.factors("b"), strict=True)])

    def weight_change(self) -> Tensor:
        """What the adapters add to this rank's part of the layer's weight, [out, in] in fp32."""
        pairs = zip(self.factors("a"), self.factors("b"), strict=True)
        return self._fuse([self.scale * (b.float() @ a.float()).T for a, b in pairs]).T

    def _fuse(self, parts: Sequence[Tensor]) -> Tensor:
        given, shape = dict(zip(self.targets, parts, strict=True)), parts[0].shape[:-1]
        every = [given[n] if n in given else parts[0].new_zeros(*shape, width) for n, width in self.widths.items()]
        return fuse(every, self.groups)

    def _exchange(self, low_sbr: Tensor) -> Tensor:
        """The narrow tensor between the factors, from where A is to where B is."""
        if self.group.size() == 1:
            return low_sbr
        if self.by_row:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low_sbr, group=self.group)
            return reduce_from_tensor_model_parallel_region(low_sbr, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low_sbr, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(low_sbr, group=self.group)

    def _drop(self, x_sbi: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x_sbi
        if self.by_row or self.sequence_parallel:  # ranks hold different numbers, and draw different ones
            with get_cuda_rng_tracker().fork():
                return F.dropout(x_sbi, self.dropout)
        return F.dropout(x_sbi, self.dropout)

    @torch.no_grad()
    def reset(self, seed: int, layer: int) -> None:
        """A uniform in +- 1 / sqrt(inputs), as in peft; B zero: the model starts as it is."""
        for name, (_, columns) in self.targets.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {name}".encode()))
            drawn = torch.rand(self.rank, columns, generator=generator, device="cpu")
            whole = (2 * drawn - 1) * columns**-0.5
            a, b = (getattr(self, f"{name}_{which}") for which in "ab")
            first = self.group.rank() * a.shape[1] if self.by_row else 0
            a.copy_(whole[:, first : first + a.shape[1]])
            b.zero_()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Each factor as part of a whole tensor, in Megatron-Core's terms."""
        axes = {f"{name}_a": 1 for name in self.targets} if self.by_row else {f"{name}_b": 0 for name in self.targets}
        state = self.state_dict(prefix="", keep_vars=True)
        data_group = (metadata or {})["dp_cp_group"]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, tp_group=self.group, dp_cp_group=data_group
        )


def attach(chunk: GPTModel, model: ModelConfig, adapter: Adapter, dropout: float) -> None:
    """Give the linear layers of a chunk their adapters, which do nothing yet. What else there is no longer trains."""
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for name in projections(model):
            if adapter.parts(name, model):
                parent, _, linear = name.rpartition(".")
                beside = LinearAdapter(chunk.config, name, model, adapter, dropout, chunk.pg_collection.tp)
                setattr(layer.get_submodule(parent), linear + SUFFIX, beside)
                beside.hook = layer.get_submodule(name).register_forward_hook(_adding(beside))
    reset(chunk, seed=0)


def _adding(adapter: LinearAdapter) -> Any:
    def add(linear: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
        return (output[0] + adapter(inputs[0]), output[1]) if adapter.active else output

    return add


def reset(chunk: GPTModel, seed: int) -> None:
    """New weights for the adapters, which depend on the seed alone."""
    for layer in chunk.decoder.layers:
        for adapter in _adapters(layer):
            adapter.reset(seed, layer.layer_number)


@torch.no_grad()
def merge(chunk: GPTModel) -> None:
    """Add the adapters to the weights beside them, in fp32, and remove them: everything trains again (see `attach`)."""
    chunk.requires_grad_(True)
    for layer in chunk.decoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            for name in [n for n, child in parent.named_children() if isinstance(child, LinearAdapter)]:
                adapter, linear = getattr(parent, name), getattr(parent, name.removesuffix(SUFFIX))
                linear.weight.copy_(linear.weight.float() + adapter.weight_change())
                adapter.hook.remove()
                delattr(parent, name)


def _adapters(module: torch.nn.Module) -> list[LinearAdapter]:
    return [child for child in module.modules() if isinstance(child, LinearAdapter)]


class FirstAdapters:
    """The adapters that a model started with, for its frozen reference: none, or a copy of their weights.

    All else of the two models is the same memory.
    """

    def __init__(self, chunks: Sequence[GPTModel], keep: bool) -> None:
        """`keep`: they come from a checkpoint; otherwise they are new, and the model starts without any."""
        self._adapters = [adapter for chunk in chunks for adapter in _adapters(chunk)]
        self._kept = [p.detach().clone() for adapter in self._adapters for p in adapter.parameters()] if keep else None

    @contextlib.contextmanager
    def back(self) -> Iterator[None]:
        """The model as it started, within a `with` block."""
        parameters = [p for adapter in self._adapters for p in adapter.parameters()]
        now = [p.data for p in parameters]
        try:
            if self._kept is None:
                self._switch(False)
            else:
                _point(parameters, self._kept)
            yield
        finally:
            self._switch(True)
            _point(parameters, now)

    def _switch(self, active: bool) -> None:
        for adapter in self._adapters:
            adapter.active = active


def _point(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
