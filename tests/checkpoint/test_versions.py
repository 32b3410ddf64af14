"""Checkpoints of the other supported version of Megatron-Core: training continues from them bit for bit, in both directions.

The other version needs another Python: OTHER_PYTHON names it (`.ci/run` does).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
OTHER = os.environ.get("OTHER_PYTHON")
PROGRAM = """
import json, sys
from pathlib import Path
import test_sharded
from ranks import run_ranks

if __name__ == "__main__":
    step, folder, model, layout = sys.argv[1:]
    ranks, parallel = test_sharded.LAYOUTS[layout]
    results = run_ranks(ranks, getattr(test_sharded, step), Path(folder), model, parallel, timeout=200)
    print("figures", json.dumps([figures for _, figures, _ in results]))
"""


def figures(python: str, step: str, folder: Path, model: str, layout: str) -> list:
    """Losses and gradient norms of two updates on every rank: after a checkpoint was written, or after one was loaded."""
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    paths = [TESTS.parent, TESTS, TESTS / "checkpoint"]
    done = subprocess.run(
        [python, str(program), step, str(folder), model, layout],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("figures ")[2])


@pytest.mark.skipif(OTHER is None, reason="OTHER_PYTHON is not set: needs a Python with the other version")
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours_in_the_other", "the_others_here"])
@pytest.mark.parametrize(("model", "layout"), [("gpt2", "dp2_distributed"), ("llama", "tp2_sp")])
def test_training_goes_on_from_the_other_versions_checkpoint(tmp_path, model, layout, ours_first):
    assert OTHER is not None
    first, second = (sys.executable, OTHER) if ours_first else (OTHER, sys.executable)
    arguments = (tmp_path / "step_2", model, layout)
    uninterrupted = figures(first, "save", *arguments)
    assert figures(second, "load", *arguments) == uninterrupted
