"""Stacks of this process and of another one that runs no Python any more."""

import ctypes
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from ranks import CONTEXT

from megatron_rlhf.runs.watching.heartbeat import Beat
from megatron_rlhf.runs.watching.stacks import Stacks


def hold_the_interpreter() -> None:
    libc = ctypes.PyDLL(None)  # it keeps the interpreter's lock, as a CDLL does not
    while True:
        libc.sleep(120)


def hang(folder: Path, sender: Connection) -> None:
    stacks = Stacks(folder, 1)
    sender.send((os.getpid(), stacks.descriptor))
    hold_the_interpreter()


def test_a_rank_writes_its_own(tmp_path: Path) -> None:
    stacks = Stacks(tmp_path / "stacks", 3)
    stacks.write()
    stacks.close()
    text = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert text.startswith(f"rank 3, process {os.getpid()}, 20")
    assert "in test_a_rank_writes_its_own" in text


def test_a_rank_that_hangs_in_a_call_is_asked(tmp_path: Path) -> None:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=hang, args=(tmp_path / "stacks", sender))
    process.start()
    stacks = Stacks(tmp_path / "stacks", 0)
    try:
        pid, descriptor = receiver.recv()
        deadline = time.monotonic() + 20
        text = ""
        while "in hold_the_interpreter" not in text and time.monotonic() < deadline:  # it may not be there yet
            stacks.write_for(Beat(1, pid=pid, stacks=descriptor))
            text = (tmp_path / "stacks" / "rank_1.txt").read_text()
        assert text.startswith("rank 1, asked by a signal\n")
        assert "in hold_the_interpreter" in text and "in hang" in text
        (tmp_path / "stacks" / "rank_1.txt").unlink()
    finally:
        process.kill()
        process.join()
    stacks.write_for(Beat(1, pid=pid, stacks=descriptor))
    assert not (tmp_path / "stacks" / "rank_1.txt").exists(), "it is gone"
    stacks.close()
