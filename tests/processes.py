"""Ranks as processes that can be killed, and that show the killer what they are doing."""

import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import free_port, run_command
from ranks import CONTEXT

SCRIPTS = {"sft": "train_sft", "reward_model": "train_reward_model", "ppo": "train_ppo"}
LABEL = 80
"""Bytes reserved for a rank's description of what it is doing."""


@dataclass
class Run:
    """The processes of one start of a stage, and what each of them is doing."""

    processes: list[Any]
    labels: Path

    @classmethod
    def start(
        cls,
        stage: str,
        arguments: list[str],
        ranks: int,
        folder: Path,
        prepare: Callable[[int, str], None] | None = None,
        how: str = "",
    ) -> "Run":
        """`prepare(rank, how)` is called in each process first."""
        folder.mkdir(parents=True, exist_ok=True)
        labels, port = folder / "labels", free_port()
        labels.write_bytes(bytes(LABEL * ranks))
        processes = []
        for rank in range(ranks):
            args = (
                rank,
                ranks,
                port,
                SCRIPTS[stage],
                tuple(arguments),
                folder / f"output_{rank}",
                labels,
                prepare,
                how,
            )
            processes.append(CONTEXT.Process(target=_rank, args=args))
            processes[-1].start()
        return cls(processes, labels)

    def label(self, rank: int) -> str:
        text = self.labels.read_bytes()[rank * LABEL : (rank + 1) * LABEL]
        return text.rstrip(b"\0").decode() or "start"

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended by themselves."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        return not any(process.is_alive() for process in self.processes)

    def left(self) -> int:
        """Process groups of ranks that still have a process in them; those are ended now."""
        count = 0
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
                count += 1
            except ProcessLookupError:
                pass
        return count

    @property
    def codes(self) -> list[int]:
        return [process.exitcode for process in self.processes]


def _rank(
    rank: int,
    ranks: int,
    port: int,
    script: str,
    arguments: tuple[str, ...],
    output: Path,
    labels: Path,
    prepare: Callable[[int, str], None] | None,
    how: str,
) -> None:
    if prepare is not None:
        prepare(rank, how)
    _label_phases(rank, labels)
    run_command(rank, ranks, port, script, arguments, output)


def _label_phases(rank: int, labels: Path) -> None:
    """Have this process record the innermost thing it is doing, where the killer can read it."""
    import contextlib

    from megatron_rlhf.monitoring.progress import PhaseTimer
    from megatron_rlhf.runs.checkpoints import CheckpointWriter
    from megatron_rlhf.runs.session import Session

    with labels.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)

    def show(text: str) -> None:
        memory[rank * LABEL : (rank + 1) * LABEL] = text.encode()[:LABEL].ljust(LABEL, b"\0")

    time_phase, log = PhaseTimer.__call__, Session.log
    done = [0]

    @contextlib.contextmanager
    def timed(self, phase):
        with time_phase(self, phase):
            show(f"step {done[0] + 1}, {'update' if phase == 'step' else phase}")
            yield
            show(f"step {done[0] + 1}, update")

    def logged(self, step, metrics):
        show(f"step {step}, log")
        done[0] = step
        log(self, step, metrics)

    def saving(method):
        def save(self, *arguments, **keywords):
            show(f"step {done[0]}, save")
            try:
                return method(self, *arguments, **keywords)
            finally:
                show(f"step {done[0]}, after the save")

        return save

    PhaseTimer.__call__, Session.log = timed, logged
    for name in ("save", "save_in_background", "finish"):
        setattr(CheckpointWriter, name, saving(getattr(CheckpointWriter, name)))
