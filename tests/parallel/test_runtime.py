"""Who a process is, read from the environment that python, torchrun or srun gives it."""

import os
import subprocess

import pytest
import torch.distributed as dist

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.runtime import Launch, detect_launch

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}


def test_plain_python_is_one_rank():
    assert detect_launch({}) == Launch(0, 1, 0)


def test_torchrun():
    assert detect_launch(TORCHRUN) == Launch(5, 8, 1)


def test_srun():
    assert detect_launch(SRUN) == Launch(3, 4, 1)


def test_torchrun_inside_an_srun_step_goes_before_slurm():
    assert detect_launch(SRUN | TORCHRUN) == Launch(5, 8, 1)


def test_a_shell_in_an_allocation_is_no_step():
    assert detect_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Launch(0, 1, 0)


def test_rank_without_world_size_is_not_torchrun():
    assert detect_launch({"RANK": "3"}) == Launch(0, 1, 0)


def test_initialize_twice_is_one_world(world):
    assert runtime.initialize() == runtime.initialize() == Launch(0, 1, 0)
    assert dist.get_world_size() == 1


def fake_scontrol(monkeypatch, address):
    """`scontrol` as Slurm answers for the nodes n[1-2]."""

    def run(command, **kwargs):
        out = (
            "n1\nn2\n"
            if command[2] == "hostnames"
            else f"NodeName=n1 Arch=x86_64\n   NodeAddr={address} NodeHostName=n1"
        )
        return subprocess.CompletedProcess(command, 0, stdout=out, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    for name, value in (SRUN | {"SLURM_STEP_NODELIST": "n[1-2]"}).items():
        monkeypatch.setenv(name, value)


def test_slurm_rendezvous_is_the_first_nodes_address(monkeypatch):
    fake_scontrol(monkeypatch, "127.0.0.1")
    host, port = runtime._slurm_rendezvous()
    assert host == "127.0.0.1"
    assert 20000 <= int(port) < 40000
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert runtime._slurm_rendezvous()[1] != port, "two jobs on a node do not meet on one port"


def test_a_node_that_cannot_be_resolved_is_named(monkeypatch):
    fake_scontrol(monkeypatch, "no-such-host.invalid")
    with pytest.raises(UserError, match=r"n1 \(no-such-host\.invalid\) cannot be resolved"):
        runtime._slurm_rendezvous()


def test_no_rendezvous_says_what_to_use(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="use torchrun or srun"):
        runtime._slurm_rendezvous()
