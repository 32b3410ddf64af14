"""The peak of memory covers the time since it was last read."""

import numpy

from megatron_rlhf.monitoring.memory import peak_bytes

MEBIBYTE = 2**20


def test_a_peak_is_seen_after_it_is_over_and_then_forgotten() -> None:
    peak_bytes()  # what this process has held so far is forgotten
    before = peak_bytes()
    block = numpy.ones(64 * MEBIBYTE, dtype=numpy.uint8)
    del block
    assert peak_bytes() > before + 60 * MEBIBYTE
    assert peak_bytes() < before + 30 * MEBIBYTE
