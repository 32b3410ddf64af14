"""Which stage a run folder belongs to: a folder has one, and only an evaluation may add to another stage's."""

from pathlib import Path

import yaml

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.files import replacing

NAME = "stage"
EVALUATION = "evaluate"
EVALUATIONS = "evaluation"
"""Folder inside a training run's folder with the files of an evaluation."""
RUNS = {
    "sft": "supervised fine-tuning",
    "reward_model": "the training of a reward model",
    "ppo": "PPO",
    EVALUATION: "an evaluation",
}
"""Stage -> what its runs are called in messages."""


def folder_for(run_dir: Path, stage: str) -> Path:
    """Where a run of the stage writes its files: `run_dir`, or its own folder in it when evaluating a training run.

    Raises:
        UserError: the folder holds a run of another stage.
    """
    found = stage_of(run_dir)
    if found in (None, stage):
        return run_dir
    if stage == EVALUATION:
        return run_dir / EVALUATIONS
    assert found is not None
    raise UserError(f"run.dir={run_dir} holds {RUNS[found]}, and this is {RUNS[stage]}: choose another folder")


def stage_of(run_dir: Path) -> str | None:
    """What the folder's file `stage` says; without one, the stage whose settings its config.yaml has."""
    try:
        stage = (run_dir / NAME).read_text().strip()
    except (OSError, UnicodeDecodeError):
        stage = ""
    if stage in RUNS:
        return stage
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return next((stage for stage in RUNS if isinstance(config, dict) and stage in config), None)


def write_stage(run_dir: Path, stage: str) -> None:
    """Record in the folder which stage it belongs to. On one rank."""
    with replacing(run_dir / NAME) as file:
        file.write(f"{stage}\n".encode())
