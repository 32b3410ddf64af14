"""Checks of the scripts that need no Slurm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
JOBS = sorted(path for path in SLURM.glob("*.sh") if "\n#SBATCH" in path.read_text())


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("in CI this is never skipped: apt-get install shellcheck")
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", *SLURM.glob("*.sh")], capture_output=True, text=True, cwd=SLURM.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_jobs_can_be_interrupted_and_queued_again(script: Path) -> None:
    text = script.read_text()
    for flag in ("--requeue", "--open-mode=append", "--signal=B:USR1@"):
        assert f"#SBATCH {flag}" in text


def test_jobs_find_the_repository_in_the_same_way() -> None:
    texts = [script.read_text() for script in JOBS]
    ways = {text[text.index("submitted=$(") : text.index("here/common.sh: no such file")] for text in texts}
    assert len(ways) == 1


def test_there_are_jobs_for_all_stages() -> None:
    assert [path.stem for path in JOBS] == ["ppo_175b", "ppo_175b_het", "ppo_1_3b", "reward_model_6b", "sft_175b"]


def test_the_pipeline_names_what_it_lacks() -> None:
    done = subprocess.run(
        ["bash", SLURM / "pipeline_175b.sh"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode != 0
    assert "RUNS: a folder that all nodes share" in done.stderr


def test_jobs_are_to_be_submitted() -> None:
    done = subprocess.run(
        ["bash", SLURM / "ppo_175b.sh"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr
