"""Checkpoints of models with and without Transformer Engine's layers are the same: names, shapes, places; and they load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ENGINE = Path(sys.prefix) / "transformer_engine"
"""The package `transformer-engine` without its compiled parts."""


@pytest.mark.skipif(not ENGINE.is_dir(), reason=f"{ENGINE} is not there: tests/run.sh puts it there")
def test_checkpoints_with_and_without_transformer_engine_are_the_same(tmp_path):
    paths = [TESTS.parent, TESTS, TESTS / "models", ENGINE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    program = TESTS / "models" / "engine_stand_in.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(rank), "2", str(tmp_path)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},  # a world of their own, not pytest's
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
