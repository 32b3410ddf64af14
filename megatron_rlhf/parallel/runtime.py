"""Starting and ending the process group: plain `python`, `torchrun` and `srun` alike."""

import datetime
import os
import re
import socket
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlhf.config.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Who this process is among all."""

    rank: int
    world_size: int
    local_rank: int


def detect_launch(environment: dict[str, str] | os._Environ = os.environ) -> Launch:
    """Read rank and world size from torchrun's variables, else Slurm's, else take one rank."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0")))
    # An interactive shell inside an allocation has SLURM_NTASKS too, but only a step started by srun has a step id.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return Launch(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_NTASKS"]),
            int(environment.get("SLURM_LOCALID", "0")),
        )
    return Launch(0, 1, 0)


def initialize(timeout_minutes: float = 30) -> Launch:
    """Join the world (NCCL on GPUs, gloo on CPUs). Calling it again returns the same launch."""
    launch = detect_launch()
    if dist.is_initialized():
        return launch
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch.local_rank)
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    if launch.world_size > 1 and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _slurm_rendezvous()
    init_method = "env://"
    if launch.world_size == 1:  # no rendezvous needed: a file avoids every question of ports
        init_method = f"file://{tempfile.mkdtemp(prefix='megatron_rlhf_')}/rendezvous"
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=torch.device("cuda", launch.local_rank) if on_gpu else None,
    )
    return launch


def is_first_to_report(message: str) -> bool:
    """Whether no other rank has said the same before; only to be asked once the world is joined."""
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.add(f"reported {message}", 1) == 1
    except dist.DistError:  # the store has gone with the first rank, which leaves after it has spoken
        return False


def shutdown() -> None:
    """Leave the world quietly; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _slurm_rendezvous() -> tuple[str, str]:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(
            "MASTER_ADDR is not set and there is no SLURM_JOB_NODELIST to take it from: use torchrun or srun"
        )
    first = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    name = first.stdout.split()[0]
    shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, check=False).stdout
    address = re.search(r"NodeAddr=(\S+)", shown)
    host = address.group(1) if address else name
    try:
        socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"node {name} ({host}) cannot be resolved from {socket.gethostname()}: {error}") from error
    return host, str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
