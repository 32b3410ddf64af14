"""The peak of memory covers the time since it was last read."""

import mmap

from megatron_rlhf.monitoring.memory import peak_bytes

MEBIBYTE = 2**20


def test_a_peak_is_seen_after_it_is_over_and_then_forgotten() -> None:
    peak_bytes()  # what this process has held so far is forgotten
    before = peak_bytes()
    # From the system, as an array may not be: it may take memory that this process has kept.
    mmap.mmap(-1, 64 * MEBIBYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    assert peak_bytes() > before + 60 * MEBIBYTE
    assert peak_bytes() < before + 30 * MEBIBYTE
