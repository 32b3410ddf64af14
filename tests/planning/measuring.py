"""Bytes that real roles hold on a CPU: the tensors themselves, what autograd saves, and what the allocator handed out."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision, Recompute
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.trainers.step import TrainedRole


def trained_role(
    model: ModelConfig, parallel: ParallelConfig, precision: str = "fp32", scalar: bool = False, dropout: float = 0.0
) -> TrainedRole:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    layout = ParallelLayout.create(parallel)
    with layout:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    role = Role.build("policy", model, layout, Precision(precision), scalar, dropout)
    return TrainedRole.create(role, OptimizerConfig(), Precision(precision), ema_decay=0.9)


def text_batch(trained: TrainedRole, rows: int, length: int, micro_batch_size: int) -> list[Microbatch]:
    """A language model's microbatches."""
    tokens = torch.randint(trained.role.model.vocab_size, (rows, length))
    batch = TokenBatch.pack(list(tokens), [1] * rows)
    return language_model_microbatches(batch, trained.role, micro_batch_size, "x/loss")


def state_bytes(trained: TrainedRole) -> dict[str, int]:
    """Bytes of this rank's weights, gradients, optimizer state and moving average, after at least one update."""
    weights = _storages(p.data for chunk in trained.role.chunks for p in chunk.parameters())
    gradients = _storages(buffer.grad_data for chunk in trained.role.chunks for buffer in chunk.buffers)
    tensors: list[Tensor] = []
    for part in trained.optimizer.chained_optimizers:
        tensors += [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        tensors += [p.data for group in part.optimizer.param_groups for p in group["params"]]
    optimizer = {k: n for k, n in _storages(tensors).items() if k not in weights}  # fp32 weights are their own master
    assert trained.average is not None
    ema = _storages(x for shadow in trained.average.shadows for x in shadow.values())
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "ema": ema}
    return {kind: sum(storages.values()) for kind, storages in parts.items()}


def saved_peak(trained: TrainedRole, work: Callable[[], Any]) -> int:
    """Most bytes that autograd has saved at any time, except weights; each storage counts once."""
    weights = _storages(p.data for chunk in trained.role.chunks for p in chunk.parameters())
    uses: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    held = peak = 0

    class Box:
        """Stands in for a saved tensor until it is no longer needed."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(key: int) -> None:
        nonlocal held
        uses[key] -= 1
        held -= sizes[key] if not uses[key] else 0

    def pack(tensor: Tensor) -> Any:
        nonlocal held, peak
        key = tensor.untyped_storage().data_ptr()
        if not key or key in weights:
            return tensor
        if not uses[key]:
            sizes[key] = tensor.untyped_storage().nbytes()
            held += sizes[key]
        uses[key] += 1
        peak = max(peak, held)
        box = Box(tensor)
        weakref.finalize(box, release, key)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor if isinstance(x, Box) else x):
        work()
    return peak


def allocated_peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work` has held beyond what was there before. For one rank: gloo frees on threads not seen here."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert abs(held) < 0.02 * peak, "the profiler has lost frees, so its peak means nothing"
    return peak


def measure_state(model: ModelConfig, parallel: ParallelConfig, precision: str) -> dict[str, int]:
    """On every rank, for `run_ranks`."""
    trained = trained_role(model, parallel, precision)
    trained.update(text_batch(trained, 4, 16, 1), 1e-4)
    return state_bytes(trained)


def measure_saved(model: ModelConfig, parallel: ParallelConfig, precision: str, microbatches: int) -> int:
    """On every rank, for `run_ranks`: two rows of 128 tokens per microbatch."""
    trained = trained_role(model, parallel, precision)
    batch = text_batch(trained, 2 * microbatches * trained.role.layout.dp_size, 128, 2)
    return saved_peak(trained, lambda: trained.update(batch, 1e-4))


def measure_kept(model: ModelConfig, parallel: ParallelConfig, precision: str) -> int:
    """On every rank, for `run_ranks`: bytes of the copy of a gradient that is kept separate from the rest."""
    trained = trained_role(model, parallel, precision)
    kept = trained.accumulate(text_batch(trained, 4, 16, 1), keep=True).kept
    assert kept is not None
    return sum(_storages(kept.copies).values())


def layout(tensor: int = 1, pipeline: int = 1, recompute: str = "none", **flags: Any) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, pipeline=pipeline, recompute=Recompute(recompute), **flags)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
