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


def export(project: Project, path: Path, teams: Sequence[str], blank: bool = False) -> int:
    """Writes one line an answer and returns how many there are; `path` is replaced as a whole.

    Rankings: {"prompt", "responses", "ranks" (0 = best, equal = tie), "ratings", "metadata", "sources", "labeler", "team",
    "task"}, and "note" and "user" where there are any. Demonstrations: {"prompt", "response", "labeler", "team", "task"}.

    Raises:
        UserError: There is no answer yet, or the file cannot be written.
    """
    rows = list(exported(project, teams, blank))
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


def exported(project: Project, teams: Sequence[str], blank: bool = False) -> Iterator[dict[str, Any]]:
    """The lines of `export`. Outputs that are the same text have the same rank.

    Training takes no response without a text, though a policy may give one: with `blank` they are kept, to compare policies.
    """
    for answer in project.answers(teams):
        row: dict[str, Any] = dict(answer.task.given or {"prompt": answer.task.prompt})
        if project.settings.kind == DEMONSTRATIONS:
            row["response"] = answer.content["response"]
        else:
            kept = [i for i, text in enumerate(answer.task.outputs) if blank or text.strip()]
            if len(kept) < 2:
                continue
            row["responses"] = [answer.task.outputs[i] for i in kept]
            row["ranks"] = dense([answer.content["ranks"][i] for i in kept])
            row |= {name: [answer.content[name][i] for i in kept] for name in ("ratings", "metadata")}
            row["sources"] = [answer.task.sources[i] for i in kept]
            if answer.content["note"]:
                row["note"] = answer.content["note"]
        if answer.task.user is not None:
            row["user"] = answer.task.user
        yield {**row, "labeler": answer.labeler, "team": answer.team, "task": answer.number}
