"""Shared by all tests: a world of one rank in the test process itself. For more ranks see ranks.py."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from ranks import run_ranks
from recipe import Recipe, make_data, run_stage

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    """A process group of one rank."""
    from megatron_rlhf.parallel import runtime

    runtime.initialize()
    yield
    runtime.shutdown()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Data of the toy recipe and one checkpoint each that stages start from: `sft` and `reward_model`, made on one rank."""
    made = make_data(tmp_path_factory.mktemp("recipe"))
    longer = ("sft.epochs=10", "sft.dropout=0", "policy.optimizer.lr=4e-3")  # until some responses stop
    run_ranks(1, run_stage, "sft", made.sft("sft", *longer), timeout=400)
    run_ranks(1, run_stage, "reward_model", made.reward_model("reward_model", made.root / "sft"), timeout=400)
    return made


@pytest.fixture(scope="session")
def reference_world(tmp_path_factory: pytest.TempPathFactory):
    """Data and models read by both the runs of tests/reference and the independent program."""
    from reference.world import make_world

    return make_world(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that is stored beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there: real data is kept outside the repository")
    return SHARED_DATA
