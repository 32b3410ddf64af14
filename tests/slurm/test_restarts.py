"""Which ends of a job are followed by another start, under a real Slurm."""

import time

import pytest
from stub import Stub

pytestmark = pytest.mark.timeout(600)


def test_jobs_come_back_as_long_as_they_make_progress(stub: Stub) -> None:
    """All at once: most of the time of a restart is Slurm's."""
    once = stub.submit("once", "stub.first=kill@1")
    crash = stub.submit("crash", "stub.first=kill", "stub.second=exit:1", "stub.third=kill")
    starts = [f"stub.{start}=kill@1" for start in ("first", "second", "third", "fourth")]
    unsaved = stub.submit("unsaved", *starts, "stub.save=0", MAX_RESTARTS="2")
    saved = stub.submit("saved", *starts, "stub.steps=6", MAX_RESTARTS="1")
    never = stub.submit("never", "stub.first=kill@1", MAX_RESTARTS="0")

    job = once.end()
    assert (job.state, job.restarts) == ("COMPLETED", 1), once.log
    assert [(r["from"], r["checkpoint"], r["steps"], r["code"]) for r in once.record] == [("-", "step_1", "1", "137")]
    node = once.ranks(0)[-1][3]
    assert once.record[0]["cause"] == f"{node}: task 3: Killed"
    assert f"start 2 of job {job.id}, from step_1; it ended: {node}: task 3: Killed" in once.log

    job = crash.end()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 1), crash.log
    assert "not queued again: 2 starts in a row made no progress" in crash.last_line

    job = unsaved.end()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 137, 2), unsaved.log
    assert "3 starts in a row made no new checkpoint, and MAX_RESTARTS=2" in unsaved.last_line

    job = saved.end()
    assert (job.state, job.restarts) == ("COMPLETED", 4), saved.log
    assert [r["from"] for r in saved.record] == ["-", "step_1", "step_2", "step_3"]

    job = never.end()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 137, 0), never.log


def test_the_node_that_failed_is_left_out(stub: Stub) -> None:
    """That of a task that died, and the one that the watchdog names."""
    ways = ("kill", "watchdog")
    jobs = [
        stub.submit(f"excluded_{how}", f"stub.first={how}@1", flags=["--nodes=1"], EXCLUDE_FAILED="1") for how in ways
    ]
    for job in jobs:
        assert job.end().state == "COMPLETED", job.log
        first, second = job.ranks(0)[0][3], job.ranks(1)[0][3]
        assert {first, second} == {"n1", "n2"}
        assert f"is queued again, not on {first}" in job.log


def test_a_mistake_is_the_last_line_and_exit_code_2_at_any_number_of_ranks(stub: Stub) -> None:
    job = stub.submit("mistake", "stub.first=mistake")
    ended = job.end()
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), job.log
    assert job.last_line == "error: data.prompts=nowhere.jsonl: no such file"
    assert "srun" not in job.log and "slurmstepd" not in job.log


def test_a_signal_while_planning_does_not_end_the_job(stub: Stub) -> None:
    job = stub.submit("planning", "stub.planning=5")
    while "planner asked" not in job.log:
        time.sleep(0.2)
    stub.cluster.client("scancel", "--batch", "--signal=USR1", str(job.number))
    ended = job.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.log
    assert job.log.count("planner asked") == 2
    assert "srun" not in job.log


def test_time_limits(stub: Stub) -> None:
    """Slurm looks at time limits every half a minute, and warns as much earlier: a minute's with @1 after 29 s at least."""
    useless = stub.submit("useless", "stub.steps=1000", flags=["--time=1", "--signal=B:USR1@60"])
    short = stub.submit("short", flags=["--time=1", "--signal=B:USR1@1"], **{"PLAN": "1"})
    middle = stub.submit("middle", "stub.first=hang@1", flags=["--time=1", "--signal=B:USR1@1"])
    shorter = stub.submit("shorter", "stub.planned=61", flags=["--time=1", "--signal=B:USR1@1"])

    ended = shorter.end()
    assert (ended.state, ended.exit_code) == ("FAILED", 2), shorter.log
    assert "the time limit (sbatch --time) of 60 s is not longer than one step" in shorter.last_line
    assert short.end().state == "COMPLETED", short.log
    ended = useless.end()
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), useless.log
    assert "the time limit (sbatch --time) of 60 s leaves no time for a step" in useless.last_line
    ended = middle.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), middle.log
    assert "reached its time limit in the middle of a step" in middle.log
    assert "sbatch --signal=B:USR1@1200 asks for an earlier one" in middle.log
    assert [r["cause"] for r in middle.record] == ["the time limit came in the middle of a step"]


@pytest.mark.slow
def test_a_lost_slurmstepd_gives_the_allocation_back(stub: Stub) -> None:
    job = stub.submit("lost", "stub.first=lost@1")
    began = time.monotonic()
    stub.cluster.wait(job.number, 150, until=["PENDING", "COMPLETING"])
    assert time.monotonic() - began < 120
    assert job.end().state == "COMPLETED", job.log
    assert job.record[0]["code"] == "70"
