"""`run.profile="10:12"`: where the time of these steps goes, for chrome://tracing, Perfetto or Nsight Systems."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_rlhf.config.launch import detect_launch

log = logging.getLogger(__name__)


class Profile:
    """Traces a range of steps on the first rank of each node: `profile/steps_10-12_rank_0.json` in the run folder."""

    def __init__(self, steps: range, folder: Path, rank: int):
        self._folder, self._rank = folder, rank
        self._steps = steps if detect_launch().local_rank == 0 else range(0)
        self._profiler: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of a step, numbered from 1."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one."""
        if self._profiler is None:
            return
        self._profiler.stop()
        name = self._folder / "profile" / f"steps_{self._steps[0]}-{self._steps[-1]}_rank_{self._rank}.json"
        name.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(name))
        log.info("trace: %s", name)
        self._profiler = None


@contextlib.contextmanager
def phase_range(name: str) -> Iterator[None]:
    """A phase as a range of the torch profiler, and of NVTX where there is a GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
