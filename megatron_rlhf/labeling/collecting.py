"""Answers of several policies, one evaluation after the other, become the outputs of one project."""

from collections.abc import Iterable
from pathlib import Path

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import RANKINGS, Settings, Task


def check(path: Path) -> None:
    """Whether answers can be added to a project, which may not be there yet. Raises UserError."""
    if path.exists():
        project = Project.open(path)
        kind = project.settings.kind
        project.close()
        if kind != RANKINGS:
            raise UserError(f"{path} collects {kind}; answers are ranked in a project of the kind {RANKINGS}")


def collect(path: Path, answers: Iterable[Task]) -> int:
    """Add the outputs of each prompt to those that its task has, and return how many prompts there are now.

    Outputs of the same source replace earlier ones, so that an evaluation can be repeated. A project that is not there is
    made.

    Raises:
        UserError: Somebody has one of the prompts already, or it would have more than 9 outputs.
    """
    project = Project.open(path) if path.exists() else Project.create(path, Settings())
    try:
        project.merge_tasks(answers)
        return project.size()
    finally:
        project.close()
