"""With Transformer Engine's layers a model has the checkpoint of one without them: names, shapes, places, and it loads."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def installed() -> bool:
    try:
        return bool(version("transformer-engine"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason="transformer-engine, of requirements-dev.lock, is not installed")
def test_checkpoints_with_and_without_transformer_engine_are_the_same(tmp_path):
    paths = [TESTS.parent, TESTS, TESTS / "models"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, os.environ.get("PYTHONPATH", "")]))}
    program = TESTS / "models" / "engine_stand_in.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(rank), "2", str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for printed, errors in outputs:
        assert printed.endswith("ok\n"), errors
