"""Entry points run as commands: real arguments, exit codes and output, without repeating the imports each time."""

import ctypes
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ranks import CONTEXT, DIE_WITH_PARENT

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = "megatron-rlhf"


@dataclass(frozen=True)
class Finished:
    """How a command ended, on each rank; the output of all ranks, one after the other."""

    codes: list[int]
    output: str


def run_example(script: str, *arguments: str, ranks: int = 1, timeout: float = 400, folder: Path = Path()) -> Finished:
    """`examples/SCRIPT.py ARGUMENTS`, or `megatron-rlhf ARGUMENTS`, in a folder on some ranks, as torchrun starts them."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="command_") as written:
        outputs = [Path(written) / str(rank) for rank in range(ranks)]
        processes = [
            CONTEXT.Process(target=run_command, args=(rank, ranks, port, script, arguments, outputs[rank], folder))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        codes = [process.exitcode for process in processes]
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
        output = "".join(path.read_text() for path in outputs if path.exists())
    assert None not in codes, f"not finished after {timeout:g} s:\n{output}"
    return Finished(codes, output)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_command(
    rank: int, ranks: int, port: int, script: str, arguments: tuple[str, ...], output: Path, folder: Path = Path()
) -> None:
    """Body of one rank's process."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    os.setpgrp()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if script == INSTALLED:
        from megatron_rlhf.__main__ import main

        sys.argv = [script, *arguments]
        sys.exit(main())
    path = ROOT / "examples" / f"{script}.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
