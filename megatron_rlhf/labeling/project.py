"""A labeling project: who labels what, every click of it, and the answers that stand."""

import json
import re
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.labeling import database
from megatron_rlhf.labeling.questions import LETTERS
from megatron_rlhf.labeling.types import (
    DEMONSTRATIONS,
    HELD_OUT,
    RANKINGS,
    TRAINING,
    Answer,
    Progress,
    Refused,
    Settings,
    Task,
)

NAME = re.compile(r"[\w.@-]{1,64}")


class Project:
    """An open project. Whatever a method has returned from is on the disk."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._db = connection
        stored = database.settings(connection, path)
        self.settings = Settings(**{name: value for name, value in stored.items() if name in _SETTING_NAMES})

    @classmethod
    def create(cls, path: Path, settings: Settings) -> "Project":
        """Raises UserError if there is something at `path`, or a setting is wrong."""
        if settings.kind not in (RANKINGS, DEMONSTRATIONS):
            raise UserError(f"kind {settings.kind!r}: {RANKINGS} or {DEMONSTRATIONS}")
        if settings.labels_per_prompt < 1:
            raise UserError(f"{settings.labels_per_prompt} labels a prompt: at least 1")
        connection = database.create(path)
        with database.transaction(connection):
            rows = [(name, json.dumps(value)) for name, value in asdict(settings).items()]
            connection.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        return cls(path, connection)

    @classmethod
    def open(cls, path: Path) -> "Project":
        """Raises UserError if `path` is no project."""
        return cls(path, database.connect(path))

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    # What there is to label, and by whom.

    def add_tasks(self, tasks: Iterable[Task]) -> int:
        """Adds all that the project does not have yet or, if one is wrong, none; returns how many."""
        with database.transaction(self._db):
            there = {self.task(row["id"]).content for row in self._db.execute("SELECT id FROM tasks").fetchall()}
            new = [task for task in tasks if task.content not in there]
            for task in new:
                self._check(task)
                self._add(task)
        return len(new)

    def merge_tasks(self, tasks: Iterable[Task]) -> None:
        """Adds outputs to the tasks with the same prompts, instead of those that they have of the same sources. Raises
        UserError, and adds nothing, if a prompt is with a labeler already or gets too many."""
        with database.transaction(self._db):
            for task in tasks:
                row = self._db.execute("SELECT id FROM tasks WHERE prompt = ? AND given IS ?", task.key).fetchone()
                if row is None:
                    self._require_letters(task)
                    self._add(task)
                    continue
                if self._db.execute("SELECT 1 FROM assignments WHERE task = ?", (row["id"],)).fetchone() is not None:
                    raise UserError(f"{self.path}: prompt {task.prompt!r:.60} is being labeled; use another project")
                there = self.task(row["id"])
                kept = [pair for pair in zip(there.outputs, there.sources, strict=True) if pair[1] not in task.sources]
                texts, sources = zip(*kept, *zip(task.outputs, task.sources, strict=True), strict=True)
                merged = replace(there, outputs=texts, sources=sources)
                self._require_letters(merged)
                self._db.execute("DELETE FROM outputs WHERE task = ?", (row["id"],))
                self._add_outputs(row["id"], merged)

    def _require_letters(self, task: Task) -> None:
        if len(task.outputs) > len(LETTERS):
            raise UserError(
                f"{self.path}: prompt {task.prompt!r:.60} would have {len(task.outputs)} outputs; {len(LETTERS)} at most"
            )

    def _add(self, task: Task) -> None:
        row = self._db.execute("INSERT INTO tasks (prompt, given, user) VALUES (?, ?, ?)", (*task.key, task.user))
        self._add_outputs(row.lastrowid, task)

    def _add_outputs(self, number: int | None, task: Task) -> None:
        sources = task.sources or (None,) * len(task.outputs)
        rows = [(number, i, *pair) for i, pair in enumerate(zip(task.outputs, sources, strict=True))]
        self._db.executemany("INSERT INTO outputs VALUES (?, ?, ?, ?)", rows)

    def _check(self, task: Task) -> None:
        if self.settings.kind == DEMONSTRATIONS and task.outputs:
            raise UserError(f"{self.path} collects demonstrations: its prompts have no outputs; use another project")
        if self.settings.kind == RANKINGS and not 2 <= len(task.outputs) <= len(LETTERS):
            raise UserError(
                f"prompt {task.prompt!r:.60} has {len(task.outputs)} outputs; 2 to {len(LETTERS)} can be ranked"
            )

    def add_labelers(self, names: Iterable[str], team: str) -> None:
        """Raises UserError for a name that cannot be in a link, or that is in the other team."""
        known = self.labelers()
        with database.transaction(self._db):
            for name in names:
                if not NAME.fullmatch(name):
                    raise UserError(f"labeler {name!r}: up to 64 letters, digits and any of . _ @ -")
                if known.setdefault(name, team) != team:
                    raise UserError(f"labeler {name!r} is in the team {known[name]!r} already")
                self._db.execute("INSERT OR IGNORE INTO labelers VALUES (?, ?)", (name, team))

    def labelers(self) -> dict[str, str]:
        """Name -> team."""
        return {row["name"]: row["team"] for row in self._db.execute("SELECT name, team FROM labelers ORDER BY name")}

    def task(self, number: int) -> Task:
        """Raises Refused if there is no such task."""
        row = self._db.execute("SELECT prompt, user, given FROM tasks WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise Refused(f"there is no task {number}")
        outputs = self._db.execute(
            "SELECT text, source FROM outputs WHERE task = ? ORDER BY place", (number,)
        ).fetchall()
        texts, sources = tuple(row["text"] for row in outputs), tuple(row["source"] for row in outputs)
        return Task(row["prompt"], texts, sources, row["user"], json.loads(row["given"] or "null"))

    # A labeler's way through it.

    def current(self, labeler: str) -> int | None:
        """The task that a labeler is at, or a new one; None when there is nothing left to do."""
        with database.transaction(self._db):
            row = self._db.execute(
                "SELECT task FROM assignments WHERE labeler = ? AND status = 'open' ORDER BY touched DESC, task LIMIT 1",
                (labeler,),
            ).fetchone()
            if row is not None:
                return int(row["task"])
            row = self._db.execute(database.NEXT_TASK + "LIMIT 1", self._wanted(labeler)).fetchone()
            if row is None:
                return None
            self._db.execute("INSERT INTO assignments VALUES (?, ?, 'open', ?)", (row["id"], labeler, time.time()))
            return int(row["id"])

    def left(self, labeler: str) -> int:
        """How many tasks a labeler could still get, the one that is open included."""
        opened = "SELECT count(*) FROM assignments WHERE labeler = ? AND status = 'open'"
        (count,) = self._db.execute(opened, (labeler,)).fetchone()
        (others,) = self._db.execute(f"SELECT count(*) FROM ({database.NEXT_TASK})", self._wanted(labeler)).fetchone()
        return int(count + others)

    def _wanted(self, labeler: str) -> dict[str, Any]:
        return {
            "labeler": labeler,
            "team": self.labelers()[labeler],
            "expired": time.time() - database.SECONDS_TO_ANSWER,
            "wanted": self.settings.labels_per_prompt,
            "anything": self.settings.kind == DEMONSTRATIONS,
        }

    def status(self, labeler: str, number: int) -> str:
        """open, done or skipped. Raises Refused if the labeler does not have this task."""
        row = self._db.execute(
            "SELECT status FROM assignments WHERE labeler = ? AND task = ?", (labeler, number)
        ).fetchone()
        if row is None:
            raise Refused(f"task {number} is not one of yours")
        return str(row["status"])

    def content(self, labeler: str, number: int) -> dict[str, Any]:
        """What the labeler has entered for a task so far; empty at first."""
        row = self._last_event(labeler, number)
        return json.loads(row["content"]) if row is not None else {}

    def record(self, labeler: str, number: int, action: str, content: dict[str, Any], nonce: str) -> None:
        """Keeps a click: `draft`, `submit` or `skip`. One that arrives twice, with the same nonce, counts once.

        Raises:
            Refused: The task is not the labeler's, or was answered before; `undo` opens it again.
        """
        with database.transaction(self._db):
            if self._arrived_before(nonce):
                return
            status = self.status(labeler, number)
            if status != "open":
                raise Refused(f"task {number} is {status} already; undo opens it again")
            if action == "draft":
                self._draft(labeler, number, content)
            else:
                if action == "submit" and content != self.content(labeler, number):
                    self._draft(labeler, number, content)  # what undo comes back to
                self._insert(labeler, number, action, content)
            after = {"draft": "open", "submit": "done", "skip": "skipped"}[action]
            self._touch(labeler, number, after)

    def _draft(self, labeler: str, number: int, content: dict[str, Any]) -> None:
        last = self._last_event(labeler, number)
        if last is not None and self.settings.kind == DEMONSTRATIONS:
            # A text grows by the letter, and has an undo of its own in the browser.
            self._db.execute(
                "UPDATE events SET content = ?, at = ? WHERE id = ?", (json.dumps(content), time.time(), last["id"])
            )
        else:
            self._insert(labeler, number, "draft", content)

    def undo(self, labeler: str, nonce: str) -> int | None:
        """Takes back the labeler's last click, in whichever task it was, and returns that task; None if there is none."""
        with database.transaction(self._db):
            if self._arrived_before(nonce):
                return None
            clicks = "'submit', 'skip'" if self.settings.kind == DEMONSTRATIONS else "'draft', 'submit', 'skip'"
            row = self._db.execute(
                f"SELECT id, task FROM events WHERE labeler = ? AND undone = 0 AND action IN ({clicks}) ORDER BY id DESC LIMIT 1",
                (labeler,),
            ).fetchone()
            if row is None:
                return None
            self._db.execute("UPDATE events SET undone = 1 WHERE id = ?", (row["id"],))
            self._insert(labeler, row["task"], "undo", {}, undone=1)
            self._touch(labeler, row["task"], "open")
            return int(row["task"])

    def _arrived_before(self, nonce: str) -> bool:
        return self._db.execute("INSERT OR IGNORE INTO nonces VALUES (?)", (nonce,)).rowcount == 0

    def _last_event(self, labeler: str, number: int) -> sqlite3.Row | None:
        return self._db.execute(
            "SELECT id, action, content FROM events WHERE labeler = ? AND task = ? AND undone = 0 ORDER BY id DESC LIMIT 1",
            (labeler, number),
        ).fetchone()

    def _insert(self, labeler: str, number: int, action: str, content: dict, undone: int = 0) -> None:
        self._db.execute(
            "INSERT INTO events (labeler, task, action, content, at, undone) VALUES (?, ?, ?, ?, ?, ?)",
            (labeler, number, action, json.dumps(content), time.time(), undone),
        )

    def _touch(self, labeler: str, number: int, status: str) -> None:
        self._db.execute(
            "UPDATE assignments SET status = ?, touched = ? WHERE labeler = ? AND task = ?",
            (status, time.time(), labeler, number),
        )

    # What has come of it.

    def progress(self) -> list[Progress]:
        """One entry a labeler, by name."""
        return [
            Progress(row["name"], row["team"], row["done"], row["skipped"])
            for row in self._db.execute(
                "SELECT name, team, count(*) FILTER (WHERE status = 'done') AS done,"
                " count(*) FILTER (WHERE status = 'skipped') AS skipped"
                " FROM labelers LEFT JOIN assignments ON labeler = name GROUP BY name ORDER BY name"
            )
        ]

    def size(self) -> int:
        """How many prompts there are."""
        return int(self._db.execute("SELECT count(*) FROM tasks").fetchone()[0])

    def skips(self) -> list[tuple[int, str, str, str]]:
        """(task, labeler, reason, note) of every prompt that was skipped."""
        rows = self._db.execute("SELECT task, labeler FROM assignments WHERE status = 'skipped' ORDER BY task, labeler")
        found = [(row["task"], row["labeler"], self.content(row["labeler"], row["task"])) for row in rows.fetchall()]
        return [(task, labeler, content["reason"], content["note"]) for task, labeler, content in found]

    def answers(self, teams: Sequence[str] = (TRAINING, HELD_OUT)) -> list[Answer]:
        """All answers of these teams that stand, in the order of the tasks."""
        rows = self._db.execute(
            "SELECT task, labeler, team FROM assignments JOIN labelers ON name = labeler"
            " WHERE status = 'done' ORDER BY task, labeler"
        ).fetchall()
        return [
            Answer(
                row["task"],
                self.task(row["task"]),
                row["labeler"],
                row["team"],
                self.content(row["labeler"], row["task"]),
            )
            for row in rows
            if row["team"] in teams
        ]


_SETTING_NAMES = {setting.name for setting in fields(Settings)}
