"""The test helper itself: results in order, failures named, nothing left running."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks


def rank_and_sum(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total), os.environ["RANK"]


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("a mistake on purpose")
    dist.barrier()


def vanish_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hang_on_rank_zero(pid_file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pid_file.with_name(f"{pid_file.name}_{dist.get_rank()}").write_text(f"{os.getpid()} {child.pid}")
    if dist.get_rank() == 0:
        wait_for_godot()


def wait_for_godot():
    time.sleep(60)


def test_results_come_in_the_order_of_ranks():
    assert run_ranks(3, rank_and_sum, 10) == [(rank, 3, 33.0, str(rank)) for rank in range(3)]


def test_a_rank_that_raises_is_named_with_its_traceback():
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 failed:(?s:.*)a mistake on purpose"):
        run_ranks(2, fail_on_rank_one, timeout=30)
    assert time.monotonic() - began < 50, "the rank that waits in a barrier is not waited for"


def test_a_rank_that_vanishes_is_named_with_its_exit_code():
    with pytest.raises(RankFailed, match="rank 1 exited with code 3"):
        run_ranks(2, vanish_on_rank_one, timeout=30)


def test_a_rank_that_hangs_is_shown_where_it_stands_and_nothing_is_left_running(tmp_path):
    with pytest.raises(RankFailed, match=r"not finished after 4 s(?s:.*)rank 0 is at(?s:.*)wait_for_godot"):
        run_ranks(2, hang_on_rank_zero, tmp_path / "pids", timeout=4)
    pids = [int(pid) for rank in (0, 1) for pid in (tmp_path / f"pids_{rank}").read_text().split()]
    assert len(pids) == 4
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not alive
