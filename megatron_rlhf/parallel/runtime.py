"""Starting and ending the process group: plain `python`, `torchrun` and `srun` alike."""

import datetime
import os
import re
import socket
import subprocess
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.launch import Launch, detect_launch


def initialize(timeout_minutes: float = 30) -> Launch:
    """Join the world (NCCL on GPUs, gloo on CPUs). Calling it again returns the same launch."""
    launch = detect_launch()
    if dist.is_initialized():
        return launch
    on_gpu = torch.cuda.is_available()
    device = None
    if on_gpu:  # srun --gpus-per-task shows each task only its own GPU, as number 0
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    if launch.world_size > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = rendezvous()
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        # A single rank has no one to meet: a store of its own avoids choosing a port.
        store=dist.HashStore() if launch.world_size == 1 else None,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=device,
    )
    return launch


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


def rendezvous(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Address and port where the ranks meet: from MASTER_ADDR and MASTER_PORT, and from Slurm for what they do not say.

    Raises:
        UserError: for an invalid port, and if neither gives one.
    """
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    job = environment.get("SLURM_JOB_ID", "")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: a port is a whole number from 1 to 65535")
    if not port and not job.isdecimal() and host:
        raise UserError(
            f"MASTER_ADDR={host} is set and MASTER_PORT is not: set it to a port that is free there, the same on all ranks"
        )
    return host or _first_node(environment), port or str(20000 + int(job if job.isdecimal() else "0") % 20000)


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
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
    return host
