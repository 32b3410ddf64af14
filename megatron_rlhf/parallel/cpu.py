"""Megatron-Core on a machine without CUDA.

Megatron-Core asks CUDA for a device, a random number generator and streams; nothing in its mathematics needs a GPU.
`install()` makes the CPU answer those calls. It does nothing where CUDA is present, and must run before the first
import of `megatron.core` (importing `megatron_rlhf.parallel` does that). Every patch says which call it answers.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._device import _device_constructors

from megatron_rlhf.parallel.accelerators import import_megatron_quietly

_CPU = torch.device("cpu")
# Functions with `device=`: Megatron-Core passes "cuda" literals to them (`FP32Optimizer._scale`, the schedules' token count).
_FACTORIES = """
    arange as_tensor empty empty_like full full_like ones ones_like rand rand_like randn randn_like tensor zeros zeros_like
"""


class _Stream:
    """Stands for `torch.cuda.Stream` and `Event`: on a CPU everything has happened when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Stream":
        return self


def install() -> bool:
    """Make `megatron.core` run on the CPU. If CUDA is present, changes nothing and returns False."""
    if torch.cuda.is_available():
        return False
    if getattr(torch.cuda, "_answered_by_cpu", False):
        return True
    torch.cuda._answered_by_cpu = True  # type: ignore[attr-defined]
    _import_megatron_without_compiling()
    _map_cuda_devices_to_cpu()
    _answer_cuda_runtime()
    _use_cpu_random_state()
    _gather_bucket_by_bucket()
    return True


def _import_megatron_without_compiling() -> None:
    # `megatron.core.jit` decorates its fusions with torch.compile, which on a CPU needs a C++ compiler and takes minutes.
    compile_function = torch.compile
    torch.compile = lambda function=None, **kwargs: function  # type: ignore[assignment]
    try:
        import_megatron_quietly()
    finally:
        torch.compile = compile_function


def _on_cpu(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _map_cuda_devices_to_cpu() -> None:
    def redirect(function):  # torch.zeros(..., device="cuda") allocates on the CPU
        def wrapped(*args, **kwargs):
            if _on_cpu(kwargs.get("device")):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)  # pinned memory: requested for rotary positions under context parallelism
            return function(*args, **kwargs)

        return functools.wraps(function)(wrapped)

    # `with torch.device("meta"):` (transformers loads models in it) recognises factories by identity: let it record the
    # originals.
    _device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, redirect(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # `optimizer/clip_grads.py` and `distrib_optimizer.py` assert `tensor.type() == "torch.cuda.FloatTensor"`.
    original_type = torch.Tensor.type

    def tensor_type(self, *args, **kwargs):
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = tensor_type  # type: ignore[method-assign]


def _answer_cuda_runtime() -> None:
    # One object per name: torch's compiler refuses two names for one function.
    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "default_generators": (torch.default_generator,),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _use_cpu_random_state() -> None:
    # Dropout and initial weights draw from the CPU generator, so the tracker must fork that one.
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # It warns when the CPU generator moves inside a fork of the device's; here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _gather_bucket_by_bucket() -> None:
    """Weights gathered during a forward pass: each of a group's buckets by a collective of its own.

    Gloo's coalesced all-gather, when several are under way, spoils the heap (torch 2.13): thousands of them end a process
    within seconds, and two of thirty runs of a few steps died of it. Its plain all-gather and its coalesced sums do not.
    """
    from megatron.core.distributed import param_and_grad_buffer

    coalescing = param_and_grad_buffer._coalescing_manager

    @contextlib.contextmanager
    def manager(group: dist.ProcessGroup, async_ops: bool = False) -> Iterator[Any]:
        with coalescing(group, async_ops=async_ops) as handle:
            yield handle
            recorded = distributed_c10d._world.pg_coalesce_state[group]
            gathers = [call for call in recorded if call.dst_tensor is not None and call.redop is None]
            recorded[:] = [call for call in recorded if call not in gathers]
        for call in gathers:
            handle.append(dist.all_gather_into_tensor(call.dst_tensor, call.tensor, group=group, async_op=async_ops))

    param_and_grad_buffer._coalescing_manager = manager
