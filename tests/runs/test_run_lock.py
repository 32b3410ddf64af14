"""One job in a run folder: the second gets a message that identifies the first; a killed job does not block others."""

import os
import signal
from pathlib import Path

import pytest
from ranks import CONTEXT

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.runs.run_lock import RunLock


def hold(folder: Path, ready) -> None:
    from megatron_rlhf.parallel import runtime

    os.environ["SLURM_JOB_ID"] = "4711"
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    runtime.initialize()
    lock = RunLock(folder)
    ready.send(os.getpid())
    signal.pause()
    lock.release()


def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path, world):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    holder = CONTEXT.Process(target=hold, args=(tmp_path, sender))
    holder.start()
    pid = receiver.recv()
    with pytest.raises(UserError, match=rf"run\.dir=.* is in use by job 4711, process {pid} on .*, since 20"):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    holder.join(10)
    lock = RunLock(tmp_path)
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""
