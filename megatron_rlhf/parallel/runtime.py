"""Starting and ending the process group: plain `python`, `torchrun` and `srun` alike."""

import ctypes
import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhf.config.launch import Launch, detect_launch
from megatron_rlhf.parallel.rendezvous import address, meet

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**30


def initialize(rendezvous_timeout_s: float = 300.0, longest_wait_s: float = 1800.0) -> Launch:
    """Join the world (NCCL on GPUs, gloo on CPUs). Calling it again returns the same launch.

    A rank waits for others in a collective for at least half an hour, and for longer than `longest_wait_s`. Without GPUs, this
    process keeps the memory that it frees.

    Raises:
        RunFailed: naming the ranks that have not arrived after `rendezvous_timeout_s`.
    """
    launch = detect_launch()
    if dist.is_initialized():
        return launch
    on_gpu = torch.cuda.is_available()
    timeout = datetime.timedelta(seconds=max(1800.0, 1.25 * longest_wait_s))
    device = None
    if on_gpu:
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
            os.environ.setdefault(name, "2000")  # its calls are recorded: runs/watching/stacks.py
        # srun --gpus-per-task shows each task only its own GPU, as number 0
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    store: Any = None
    if launch.world_size > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address()
    if launch.world_size == 1:
        store = dist.HashStore()  # no one to meet: a store of its own avoids choosing a port
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's agents have met before
        store = meet(launch, rendezvous_timeout_s)
        store.set_timeout(timeout)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device,
    )
    return launch


def keep_freed_memory() -> None:
    """Let glibc use the memory of freed tensors, up to 1 GiB each, again instead of giving it back to the system.

    Activations come and go in every pass, and a new page costs more than writing to it: 7 us for 4 KiB in a virtual machine.
    The process stays as large as it was at its peak. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def is_first_to_report(message: str) -> bool:
    """Whether no other rank of the world has reported this message before."""
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.add(f"reported {message}", 1) == 1
    except dist.DistError:  # the store is gone with the first rank, which leaves after it has reported
        return False


def shutdown() -> None:
    """Leave the world quietly; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
