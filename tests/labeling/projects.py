"""Small projects, and what a labeler does to them."""

import json
from pathlib import Path

from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import HELD_OUT, TRAINING, Settings, Task

ROOT = Path(__file__).resolve().parents[2]


def task(name: str, size: int = 4) -> Task:
    """A prompt whose outputs and sources say where they belong."""
    outputs = tuple(f"output {i} to {name}" for i in range(size))
    return Task(f"prompt {name}", outputs, tuple(f"policy-{i}" for i in range(size)))


def make_project(path: Path, tasks: int = 3, size: int = 4, **settings) -> Project:
    """ann and bob train, cy and di are held out."""
    project = Project.create(path, Settings(**settings))
    project.add_tasks(task(str(i), size) for i in range(tasks))
    project.add_labelers(["ann", "bob"], TRAINING)
    project.add_labelers(["cy", "di"], HELD_OUT)
    return project


def ranked(*ranks: int | None) -> dict:
    """The content of an answer with these ranks."""
    return {"ranks": list(ranks), "ratings": [None] * len(ranks), "metadata": [[] for _ in ranks], "note": ""}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
