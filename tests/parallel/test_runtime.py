"""Joining the world: where the ranks meet, and what is left behind."""

import ctypes
import platform
import resource
import subprocess
import tempfile

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.launch import Launch
from megatron_rlhf.parallel import rendezvous, runtime
from megatron_rlhf.parallel.groups import communicators

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}


def test_initialize_twice_is_one_world(world):
    assert runtime.initialize() == runtime.initialize() == Launch(0, 1, 0)
    assert dist.get_world_size() == 1


def timeouts_s() -> list[float]:
    groups = dist.group.WORLD, communicators.own_group([[0, 1], [2]])
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups if group.size() > 1
    ]


def test_groups_wait_for_as_long_as_the_world():
    assert run_ranks(3, timeouts_s, timeout=77) == [[77.0] * 2] * 2 + [[77.0]]


@pytest.mark.parametrize(("longest_wait_s", "expected"), [(0, 1800), (1800, 2250), (7200, 9000)])
def test_collectives_wait_for_longer_than_the_watchdog(monkeypatch, longest_wait_s, expected):
    """Else they would end the run before it, with a message that names no rank."""
    waits = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda **arguments: waits.append(arguments["timeout"].total_seconds())
    )
    runtime.initialize(longest_wait_s=longest_wait_s)
    assert waits == [expected]


def new_pages() -> int:
    """That the system hands out for 16 tensors of 8 MiB, after as many were freed a few times."""
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.zeros(2**21) for _ in range(16)]
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found


def new_pages_before_and_after() -> tuple[int, int]:
    ctypes.CDLL(None).mallopt(-3, 2**17)  # a process starts with this, and may raise it by itself
    before = new_pages()
    runtime.keep_freed_memory()
    return before, new_pages()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_used_again():
    ((before, after),) = run_ranks(1, new_pages_before_and_after)
    assert before > 1000 * after


@pytest.mark.parametrize(("visible", "expected"), [(8, 5), (1, 0), (4, 1)])
def test_a_rank_takes_its_own_gpu_of_those_it_sees(monkeypatch, visible, expected):
    """With srun --gpus-per-task each task sees one GPU, regardless of its local rank."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda **arguments: chosen.append(arguments["device_id"]))
    world = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "MASTER_ADDR": "nowhere", "MASTER_PORT": "29500"}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # nothing to wait for
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    runtime.initialize()
    assert chosen == [torch.device("cuda", expected)] * 2


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
    host, port = rendezvous.address()
    assert host == "127.0.0.1"
    assert 20000 <= int(port) < 40000
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert rendezvous.address()[1] != port, "two jobs on a node do not meet on one port"
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert rendezvous.address() == ("127.0.0.1", "1234"), "what is given is kept"


def test_an_address_without_a_port_is_completed_in_a_job():
    assert rendezvous.address({"MASTER_ADDR": "n1", "SLURM_JOB_ID": "7"}) == ("n1", "20007")


def test_a_node_that_cannot_be_resolved_is_named(monkeypatch):
    fake_scontrol(monkeypatch, "no-such-host.invalid")
    with pytest.raises(UserError, match=r"n1 \(no-such-host\.invalid\) cannot be resolved"):
        rendezvous.address()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "use torchrun or srun"),
        ({"MASTER_PORT": "1234"}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "n1"}, "MASTER_ADDR=n1 is set and MASTER_PORT is not"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "http"}, "MASTER_PORT=http: a port is a whole number"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "65536"}, "MASTER_PORT=65536: a port is a whole number"),
    ],
)
def test_where_to_meet_must_be_known(environment, says):
    with pytest.raises(UserError) as caught:
        rendezvous.address(environment)
    assert says in str(caught.value)


def join_and_leave(folder):
    """Files that one rank leaves in the folder for temporary files, after the world was joined and left."""
    dist.destroy_process_group()  # the test's own
    tempfile.tempdir = str(folder)
    runtime.initialize()
    dist.barrier()
    runtime.shutdown()
    return sorted(path.name for path in folder.iterdir())


def test_one_rank_leaves_no_temporary_files(tmp_path):
    assert run_ranks(1, join_and_leave, tmp_path) == [[]]
