"""What leaves a project: comparisons and demonstrations as training reads them, with who made them."""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.labeling.answers import dense
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import DEMONSTRATIONS


def export(project: Project, path: Path, teams: Sequence[str]) -> int:
    """Writes one line an answer and returns how many there are; `path` is replaced as a whole.

    Rankings: {"prompt", "responses", "ranks" (0 = best, equal = tie), "ratings", "metadata", "sources", "labeler", "team",
    "task"}, and "note" and "user" where there are any. Demonstrations: {"prompt", "response", "labeler", "team", "task"}.

    Raises:
        UserError: There is no answer yet, or the file cannot be written.
    """
    rows = list(exported(project, teams))
    if not rows:
        raise UserError(f"{project.path}: no answers of {' or '.join(teams)} labelers yet; nothing was written")
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
    return len(rows)


def exported(project: Project, teams: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of `export`. Outputs that are the same text have the same rank."""
    for answer in project.answers(teams):
        row: dict[str, Any] = {"prompt": answer.task.prompt}
        if project.settings.kind == DEMONSTRATIONS:
            row["response"] = answer.content["response"]
        else:
            row["responses"] = list(answer.task.outputs)
            row["ranks"] = dense(answer.content["ranks"])
            row["ratings"], row["metadata"] = answer.content["ratings"], answer.content["metadata"]
            row["sources"] = list(answer.task.sources)
            if answer.content["note"]:
                row["note"] = answer.content["note"]
        if answer.task.user is not None:
            row["user"] = answer.task.user
        yield {**row, "labeler": answer.labeler, "team": answer.team, "task": answer.number}
