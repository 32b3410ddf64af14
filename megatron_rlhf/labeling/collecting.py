"""Answers of several policies, one evaluation after the other, become the outputs of one project."""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.labeling import database
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import RANKINGS, Settings, Task


def check(path: Path, answers: Iterable[Task] = ()) -> None:
    """Whether answers like these can be added to a project, which may not be there yet: it is tried on a copy in memory.

    Raises:
        UserError: the project is of another kind, or would refuse them, as `collect` does.
    """
    there = database.connect(path) if path.exists() else None
    rehearsal = Project(path, database.in_memory(there))
    if there is not None:
        there.close()
    elif not os.access(next(folder for folder in path.absolute().parents if folder.exists()), os.W_OK):
        raise UserError(f"{path}: no project can be made there: its folder cannot be written")
    kind = rehearsal.settings.kind
    if kind != RANKINGS:
        raise UserError(f"{path} collects {kind}; answers are ranked in a project of the kind {RANKINGS}")
    rehearsal.merge_tasks(answers)
    rehearsal.close()


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
