"""A reward function in processes of its own, with a time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from megatron_rlhf.config.launch import without_ranks
from megatron_rlhf.rewards.worker import START

KEEPER_S = 15.0
"""A keeper has this long to end what it keeps."""


@dataclass(frozen=True)
class Answers:
    """A batch of responses, with all that is known of their prompts; ids are the prompts'."""

    prompts: list[str]
    responses: list[str]
    records: list[dict[str, Any]]
    ids: list[int]


class FunctionFailed(Exception):
    """A function, or its process, did not return scores. The message begins with the function's name."""


@dataclass
class Process:
    """In which a function runs, and its keeper."""

    popen: subprocess.Popen
    pipe: Connection
    share: slice = field(default_factory=lambda: slice(0, 0))
    """The responses that it is scoring."""
    deadline: float = 0.0
    """By which it must have answered."""

    @classmethod
    def launch(cls, spec: str) -> "Process":
        """A new Python, the keeper of the one in which the function runs (`worker.keep`)."""
        here, there = socket.socketpair()
        environment = without_ranks()  # it must not take itself for one
        # The order of sets is the same in every run, and what the function prints is in the log at once.
        environment |= {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        popen = subprocess.Popen(
            [sys.executable, "-c", START, str(there.fileno()), json.dumps(_search_path()), spec],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        there.close()
        return cls(popen, Connection(here.detach()))

    def ask(self, answers: Answers, share: slice) -> None:
        """Hand it a part of a batch."""
        names = [f"the response to prompt {number}" for number in answers.ids[share]]
        texts = answers.prompts, answers.responses, answers.records
        self.pipe.send((*(part[share] for part in texts), names))

    def end(self) -> None:
        """End it, and what it has started."""
        self.pipe.close()  # which tells the keeper
        try:
            self.popen.wait(KEEPER_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class RewardFunction:
    """`start` a batch, do something else, then take its `scores`. Each process gets a part of the batch, in one call."""

    def __init__(self, spec: str, processes: int, timeout_s: float, key: str):
        """`key`: of the configuration, whose name and `timeout_s` messages give."""
        self.name = f"{key}.function={spec}"
        self.timeout_key = f"{key}.timeout_s"
        self.timeout_s = timeout_s
        self._answers = Answers([], [], [], [])
        self._processes = [self._launch(spec) for _ in range(processes)]
        for process in self._processes:
            self._receive(process, "was not imported")

    def start(self, answers: Answers) -> None:
        """Hand out a batch."""
        self._answers = answers
        count, parts = len(answers.ids), len(self._processes)
        for i, process in enumerate(self._processes):
            self._ask(process, slice(count * i // parts, count * (i + 1) // parts))

    def scores(self) -> list[float]:
        """One for each response of the batch, in its order.

        Raises:
            FunctionFailed: the function raised or returned something else, or did not return in time.
        """
        busy = [process for process in self._processes if process.share.stop > process.share.start]
        return [score for process in busy for score in self._receive(process, "did not return")]

    def close(self) -> None:
        """End the processes, and what they have started."""
        for process in self._processes:
            process.end()
        self._processes = []

    def _launch(self, spec: str) -> Process:
        process = Process.launch(spec)
        process.deadline = time.monotonic() + self.timeout_s
        return process

    def _ask(self, process: Process, share: slice) -> None:
        process.deadline = time.monotonic() + self.timeout_s
        process.share = share
        if share.stop > share.start:
            try:
                process.ask(self._answers, share)
            except OSError as error:  # it has died since it last answered
                raise self._dead(process) from error

    def _receive(self, process: Process, what: str) -> list[float]:
        while not process.pipe.poll(0.05):
            if process.popen.poll() is not None and not process.pipe.poll(0):
                raise self._dead(process)
            if time.monotonic() > process.deadline:
                raise self._failed(f"{what} within {self.timeout_key}={self.timeout_s:g}{self._of(process)}")
        return self._answer_of(process)

    def _answer_of(self, process: Process) -> list[float]:
        """What it has answered, or died of."""
        try:
            mistake, scores = process.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead(process) from error
        if mistake is not None:
            raise self._failed(mistake)
        return scores

    def _dead(self, process: Process) -> FunctionFailed:
        code = process.popen.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self._failed(f"ended its process ({how}){self._of(process)}")

    def _failed(self, problem: str) -> FunctionFailed:
        self.close()
        return FunctionFailed(f"{self.name} {problem}")

    def _of(self, process: Process) -> str:
        ids = self._answers.ids[process.share]
        shown = ", ".join(map(str, dict.fromkeys(ids[:8])))
        return f" for {len(ids)} responses to prompts {shown}{', ...' if len(ids) > 8 else ''}" if ids else ""


def _search_path() -> Sequence[str]:
    return [os.getcwd(), *(entry for entry in sys.path if entry)]
