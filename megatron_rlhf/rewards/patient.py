"""A reward function that may take too long for some responses, which then get a score of their own: `reward.timeout_score`."""

import multiprocessing.connection
import threading
import time
from collections import deque

from megatron_rlhf.rewards.processes import Answers, FunctionFailed, Process, RewardFunction

SHOWN = 8
"""Prompts that the warning names."""


class PatientFunction(RewardFunction):
    """As `RewardFunction`, but each process gets one response at a time, so that it is known which one takes too long.

    A thread hands them out, so that the time limit holds while the rank is busy with its models.
    """

    def __init__(self, spec: str, processes: int, timeout_s: float, key: str, timeout_score: float):
        self._spec, self._timeout_score = spec, timeout_score
        self.timeouts = 0
        """Responses of the last batch for which it did not return in time."""
        self.warning: str | None = None
        """About them, for the log."""
        self._scores: list[float] = []
        self._failure: FunctionFailed | None = None
        self._thread: threading.Thread | None = None
        self._is_closing = False
        super().__init__(spec, processes, timeout_s, key)  # which may close it

    def start(self, answers: Answers) -> None:
        self._answers, self._failure = answers, None
        self._scores = [self._timeout_score] * len(answers.ids)
        self._thread = threading.Thread(target=self._try_all, name=self.name, daemon=True)
        self._thread.start()

    def scores(self) -> list[float]:
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._scores

    def close(self) -> None:
        self._is_closing = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        super().close()

    def _try_all(self) -> None:
        try:
            late = self._score_all()
        except FunctionFailed as failure:
            self._failure = failure
            return
        self.timeouts, self.warning = len(late), None
        if late:
            shown = ", ".join(str(self._answers.ids[row]) for row in sorted(late)[:SHOWN])
            self.warning = (
                f"{self.name} did not return within {self.timeout_key}={self.timeout_s:g} for {len(late)} of "
                f"{len(self._scores)} responses, which score {self._timeout_score:g}: to prompts {shown}"
                f"{', ...' if len(late) > SHOWN else ''}"
            )

    def _score_all(self) -> list[int]:
        """Score each response; returns those for which the function did not return in time."""
        waiting, late = deque(range(len(self._scores))), list[int]()
        idle, busy = list(self._processes), list[Process]()
        while (waiting or busy) and not self._is_closing:
            while waiting and idle:
                row = waiting.popleft()
                busy.append(idle.pop())
                self._ask(busy[-1], slice(row, row + 1))
            multiprocessing.connection.wait([process.pipe for process in busy], 0.05)
            for process in list(busy):
                if process.pipe.poll(0):
                    self._take(process)
                    idle.append(process)
                elif process.popen.poll() is not None:
                    raise self._dead(process)
                elif time.monotonic() <= process.deadline:
                    continue
                elif process.share.start == process.share.stop:
                    raise self._failed(f"was not imported within {self.timeout_key}={self.timeout_s:g}")
                else:
                    late.append(process.share.start)
                    busy.append(self._replace(process))
                busy.remove(process)
        return late

    def _take(self, process: Process) -> None:
        """A score; nothing of a process that has just imported the function."""
        self._scores[process.share] = self._answer_of(process)

    def _replace(self, process: Process) -> Process:
        """A new process, which has still to import the function."""
        process.end()
        self._processes[self._processes.index(process)] = new = self._launch(self._spec)
        return new
