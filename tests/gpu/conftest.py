"""Tests that need a GPU. On a machine without one every test of this folder is skipped, with the reason."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")


@pytest.fixture(scope="session")
def fp8_gpu(gpu: None) -> None:
    """Transformer Engine and a GPU whose matrix products support fp8."""
    from megatron_rlhf.config.model import Fp8Recipe
    from megatron_rlhf.parallel.accelerators import transformer_engine_serves

    capability = torch.cuda.get_device_capability()
    if capability < Fp8Recipe.tensorwise.capability:
        pytest.skip(f"no fp8: compute capability {capability[0]}.{capability[1]} is below 8.9")
    if not transformer_engine_serves():
        pytest.skip("no fp8: Transformer Engine cannot be imported")


@pytest.fixture(scope="session")
def world(gpu: None) -> Iterator[None]:
    """A process group of one rank over NCCL."""
    from megatron_rlhf.parallel import runtime

    runtime.initialize()
    yield
    runtime.shutdown()
