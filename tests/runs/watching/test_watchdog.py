"""Ranks that die, freeze, hang or diverge: the job ends in time, with one message that names them."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import ROOT
from processes import Run
from recipe import Recipe

from megatron_rlhf.runs.agreement import fingerprint
from megatron_rlhf.runs.watching.heartbeat import Beat, Place
from megatron_rlhf.runs.watching.watchdog import EXIT_CODE, is_broken_connection, tell_stuck

TIMEOUT = 5.0
HOST = re.escape(socket.gethostname())


def wait_for_godot() -> None:
    time.sleep(120)


def read_on_first_rank(hangs: bool) -> None:
    """What the first rank does for all, for longer than ranks may keep each other waiting."""
    if hangs:
        wait_for_godot()
    until, number = time.monotonic() + 2 * TIMEOUT, 0
    while time.monotonic() < until:
        number = number * 7 % 1000003
        number += len(str(number))


def misbehave(rank: int, how: str) -> None:
    """Change what this process will do at its third step."""
    from megatron_rlhf.data.batches import ShuffledBatches
    from megatron_rlhf.trainers import step
    from megatron_rlhf.trainers.sft import SFTTrainer

    train_step, take = SFTTrainer.train_step, ShuffledBatches.take
    batches = []

    def hang(self):
        if self.step == 2:
            wait_for_godot()
        return train_step(self)

    def fail(self):
        if self.step == 2:
            raise ArithmeticError("a mistake on purpose")
        return train_step(self)

    def other_batch(self, count):
        batches.append(take(self, count))
        return batches[-1] if len(batches) < 3 else batches[-1][::-1]

    def other_collective(self):
        if self.step == 2:
            step.torch.distributed.broadcast(step.torch.zeros(3), src=0)
        return train_step(self)

    if how in ("reads_long", "reads_for_ever"):
        from megatron_rlhf.trainers.setup import records

        first_message = records.first_message
        read = functools.partial(read_on_first_rank, how == "reads_for_ever")
        records.first_message = lambda problem: records.on_first_rank(read) or first_message(problem)
    elif rank == 1 and how == "another_batch":
        ShuffledBatches.take = other_batch  # type: ignore[method-assign]
    elif rank == 1 and how != "well":
        ways = {"hang": hang, "fail": fail, "another_collective": other_collective}
        SFTTrainer.train_step = ways[how]  # type: ignore[method-assign]


def start(recipe: Recipe, folder: Path, how: str = "well", *overrides: str) -> Run:
    settings = "sft.epochs=400", "run.save_every=0", f"watchdog.timeout_s={TIMEOUT}"
    arguments = recipe.sft(str(folder / "run"), *settings, *overrides)
    return Run.start("sft", arguments, 2, folder, prepare=misbehave, how=how)


def wait_for_step(run: Run, number: int) -> None:
    deadline = time.monotonic() + 60
    while (label := run.label(0)) == "start" or int(label.split(",")[0].removeprefix("step ")) < number:
        assert run.is_running() and time.monotonic() < deadline, label
        time.sleep(0.02)


def ended(run: Run, folder: Path, limit: float = 3 * TIMEOUT) -> list[str]:
    """Checks that all ranks end in time and leave nothing behind; returns what they printed about it."""
    began = time.monotonic()
    in_time = run.wait(limit)
    seconds = time.monotonic() - began
    assert run.left() == 0 and in_time, f"still running after {seconds:.0f} s"
    printed = "".join((folder / f"output_{rank}").read_text() for rank in range(2))
    lines = [line for line in printed.splitlines() if re.search("watchdog: |error: |Traceback|CRITICAL", line)]
    assert len(lines) == 1, printed
    return lines


# As seen by the reporting rank: which rank it is about, and what that rank was last seen doing.
SEEN = r"rank {rank} on {host}: role policy, phase \w+( \w+)?, step \d+, (waiting in [\w ]+|in no collective) \([\w.]+:\d+ \w+\)"


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        (signal.SIGSTOP, 0),  # the rendezvous store freezes with it
    ],
)
def test_a_rank_that_dies_or_freezes_ends_the_job(recipe, tmp_path, number, victim):
    run = start(recipe, tmp_path)
    wait_for_step(run, 20)  # a heartbeat lags a few of these steps
    os.kill(run.processes[victim].pid, number)
    (line,) = ended(run, tmp_path)
    assert f"rank {victim}" in line and "dead or frozen" in line
    assert re.search("last seen: " + SEEN.format(rank=victim, host=HOST), line), line
    assert re.search(SEEN.format(rank=1 - victim, host=HOST), line), line
    codes = run.codes
    assert codes[1 - victim] == EXIT_CODE
    assert codes[victim] == -signal.SIGKILL, "frozen processes are not left behind"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "hang",
            rf"hangs outside of the collective .* rank 1 on {HOST}: role policy, phase step, step 3, in no collective"
            r" \(test_watchdog.py:\d+ wait_for_godot\). rank 0 on .* waiting in all_reduce",
        ),
        pytest.param("another_collective", "went another way: .*", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_keeps_the_others_waiting_ends_the_job(recipe, tmp_path, how, says):
    run = start(recipe, tmp_path, how)
    wait_for_step(run, 3)
    (line,) = ended(run, tmp_path)
    assert re.search(says, line), line
    assert run.codes == [EXIT_CODE] * 2
    stacks = [(tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "in all_reduce" in stacks[0] and "wait_for_godot" not in stacks[0]
    assert ("wait_for_godot" in stacks[1]) == (how == "hang")


def test_the_first_rank_may_read_for_longer_than_others_may_wait(recipe, tmp_path):
    run = start(recipe, tmp_path, "reads_long", "sft.max_steps=2", "data.validation=null")
    assert run.wait(60 + 4 * TIMEOUT) and run.codes == [0, 0], (tmp_path / "output_0").read_text()
    assert run.left() == 0


def test_a_first_rank_that_reads_for_ever_ends_the_job(recipe, tmp_path):
    run = start(recipe, tmp_path, "reads_for_ever")
    (line,) = ended(run, tmp_path, limit=60)
    says = r"hangs outside of the collective .* rank 0 on .* \(test_watchdog.py:\d+ wait_for_godot\). rank 1 on .*"
    assert re.search(says + "waiting in wait_for_first_rank", line), line
    assert run.codes == [EXIT_CODE] * 2


def test_a_rank_with_another_batch_ends_the_job_before_it_is_used(recipe, tmp_path):
    run = start(recipe, tmp_path, "another_batch")
    (line,) = ended(run, tmp_path, limit=60)
    assert re.search(
        rf"error: ranks went different ways: rank 1 on {HOST} is at step \d+ with batch [0-9a-f]{{8}}; ", line
    )
    assert run.codes == [1, 1]


@pytest.mark.slow
def test_a_rank_that_fails_says_so_and_the_others_only_follow(recipe, tmp_path):
    run = start(recipe, tmp_path, "fail")
    run.wait(60)
    assert run.left() == 0
    printed = [(tmp_path / f"output_{rank}").read_text() for rank in range(2)]
    assert "a mistake on purpose" in printed[1]
    assert "Traceback" not in printed[0] and "watchdog: " not in printed[0]
    assert run.codes == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_ends_with_the_message_and_no_process_is_left(recipe, tmp_path, number):
    arguments = recipe.sft(str(tmp_path / "run"), "sft.epochs=400", "run.save_every=0", f"watchdog.timeout_s={TIMEOUT}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "examples/train_sft.py",
        *arguments,
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 100
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.1)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(launcher.pid).children(recursive=True)}
    ranks[1].send_signal(number)
    assert launcher.wait(TIMEOUT + 10) != 0
    assert not [rank for rank in ranks.values() if rank.is_running()]
    printed = (tmp_path / "output").read_text()
    shown, _, torchruns = printed.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert shown.count("watchdog: ") == 1, printed
    reason = {signal.SIGKILL: "Signal 9 (SIGKILL) received", signal.SIGSTOP: "watchdog: rank 1 is dead or frozen"}[
        number
    ]
    assert reason in torchruns.strip().splitlines()[-2], printed
    assert re.search(r"watchdog: rank 1 is dead or frozen.*last seen: " + SEEN.format(rank=1, host=HOST), printed)


# --- which rank is at fault -------------------------------------------------------------------------------------------


def beat(rank: int, collective: str | None, line: str = "step.py:1 f", still_s: float = 9.0) -> Beat:
    return Beat(
        rank, role="policy", phase="policy", step=7, still_s=still_s, place=Place(collective, line), host=f"n{rank}"
    )


def test_the_one_outside_of_the_collective_is_at_fault_even_while_it_moves():
    told = tell_stuck([beat(0, "all_reduce"), beat(1, "all_reduce"), beat(2, None, "files.py:3 write", still_s=0)])
    assert told.startswith(
        "hangs outside of the collective in which others have waited for 9 s: rank 2 on n2: role policy"
    )
    assert "phase policy, step 7, in no collective (files.py:3 write). rank 0 on n0" in told


def test_the_one_in_another_collective_is_at_fault():
    told = tell_stuck([beat(0, "broadcast"), beat(1, "all_reduce"), beat(2, "all_reduce")])
    assert told.startswith("went another way: others have waited for 9 s in all_reduce: rank 0 on n0")
    assert "waiting in broadcast" in told


def test_when_all_wait_for_the_same_none_is_singled_out():
    assert tell_stuck([beat(0, "barrier"), beat(1, "barrier")]).startswith(
        "all ranks have been in barrier for 9 s: rank 0"
    )


def test_broken_connections_are_told_from_other_errors():
    assert is_broken_connection(
        RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    )
    assert not is_broken_connection(RuntimeError("shapes cannot be multiplied"))
    assert not is_broken_connection(ValueError("Connection"))


def test_beats_travel_as_text():
    sent = beat(3, "all_reduce")
    assert Beat.load(sent.dump()) == sent


def test_batches_differ_in_tokens_order_or_lengths():
    batches = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2], [4]], [[1, 2, 3]], [[1, 2], [3], []]]
    assert len({fingerprint(batch) for batch in batches}) == len(batches)
    assert fingerprint([[1, 2], [3]]) == fingerprint(iter([[1, 2], [3]]))
