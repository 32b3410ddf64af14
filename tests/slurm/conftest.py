"""One small cluster for all tests of this folder: 2 nodes, each with room for a few ranks."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest
from cluster import Cluster
from stub import Stub

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


@pytest.fixture(scope="session")
def stub(cluster: Cluster) -> Stub:
    """The same scripts in a repository whose training takes milliseconds, in a folder with a blank in its name."""
    repository = cluster.folder / "a repository"
    shutil.copytree(REPOSITORY / "slurm", repository / "slurm")
    here = Path(__file__).parent
    for name in ("train_sft", "train_reward_model", "train_ppo"):
        (repository / "examples").mkdir(exist_ok=True)
        shutil.copy(here / "stub_training.py", repository / "examples" / f"{name}.py")
    (repository / "tools").mkdir()
    for name in ("plan", "doctor"):
        shutil.copy(here / "stub_planner.py", repository / "tools" / f"{name}.py")
    bin = repository / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "python").symlink_to(sys.executable)
    (bin / "activate").write_text(f'PATH="{bin}:$PATH"\n')
    return Stub(cluster, repository)
