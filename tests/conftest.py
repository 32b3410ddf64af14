"""What all tests share: a world of one rank in the test process itself. For more ranks see ranks.py."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    """A process group of one rank."""
    from megatron_rlhf.parallel import runtime

    runtime.initialize()
    yield
    runtime.shutdown()
