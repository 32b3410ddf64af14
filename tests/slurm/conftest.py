"""One small cluster for all tests of this folder: 2 nodes, each with room for a few ranks."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest
from cluster import Cluster

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm. Required in CI; elsewhere its tests are skipped without it."""
    reason = slurm.missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"in CI these tests are never skipped: {reason}")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # pytest's own paths are too long for a socket
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The same scripts that users submit."""
    return REPOSITORY / "slurm"
