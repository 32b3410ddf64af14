"""The peak memory of this process since the last call."""

import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> float:
    """Most bytes held since the last call: allocated on this rank's GPU, or resident on a CPU.

    On a CPU whose kernel does not let a process reset its peak it is the highest since the process began.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak)
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size
        return float(lines["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
