"""The SQLite file of a labeling project: its tables, and whether a file is one."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError

APPLICATION_ID = 0x4D524C48
"""In the file's header: tells a labeling project from other people's databases."""
VERSION = 2

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, user TEXT, given TEXT);
CREATE INDEX tasks_by_prompt ON tasks (prompt);
CREATE TABLE outputs (
    task INTEGER NOT NULL REFERENCES tasks, place INTEGER NOT NULL, text TEXT NOT NULL, source TEXT,
    PRIMARY KEY (task, place)
);
CREATE TABLE labelers (name TEXT PRIMARY KEY, team TEXT NOT NULL CHECK (team IN ('training', 'held_out')));
CREATE TABLE assignments (
    task INTEGER NOT NULL REFERENCES tasks, labeler TEXT NOT NULL REFERENCES labelers,
    status TEXT NOT NULL CHECK (status IN ('open', 'done', 'skipped')), touched REAL NOT NULL,
    PRIMARY KEY (task, labeler)
);
CREATE INDEX assignments_by_labeler ON assignments (labeler, status);
-- Every click of every labeler, in order. Nothing is ever deleted: what is undone is marked.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, labeler TEXT NOT NULL, task INTEGER NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('draft', 'submit', 'skip', 'undo')), content TEXT NOT NULL, at REAL NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0, FOREIGN KEY (task, labeler) REFERENCES assignments (task, labeler)
);
-- Browsers send a click again until it is answered: each has a number of its own.
CREATE TABLE nonces (nonce TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX events_by_labeler ON events (labeler, undone, id);
CREATE INDEX events_by_task ON events (task, labeler, undone, id);
"""

# A prompt is offered to a labeler who has not had it, while fewer than n of the same team label or have labeled it.
# One that was left open for a day does not count: its labeler may not come back. Outputs that are all the same text
# leave nothing to rank.
NEXT_TASK = """
SELECT id FROM tasks WHERE
    NOT EXISTS (SELECT 1 FROM assignments AS mine WHERE mine.task = tasks.id AND mine.labeler = :labeler)
    AND (SELECT count(*) FROM assignments JOIN labelers ON labelers.name = assignments.labeler
         WHERE assignments.task = tasks.id AND labelers.team = :team
         AND (status = 'done' OR (status = 'open' AND touched > :expired))) < :wanted
    AND (:anything OR (SELECT count(DISTINCT text) FROM outputs WHERE outputs.task = tasks.id) > 1)
ORDER BY id
"""
SECONDS_TO_ANSWER = 24 * 3600.0


def create(path: Path) -> sqlite3.Connection:
    """Makes a new, empty project.

    Raises:
        UserError: There is something at `path` already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} is there already; add to it with `add`, or name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = _connect(path, "rwc")
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{path}: no project can be made there: {error}") from error
    return connection


def connect(path: Path) -> sqlite3.Connection:
    """Opens an existing project.

    Raises:
        UserError: `path` is no labeling project, of a version that this one does not know, or cannot be written.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such labeling project; make one with `megatron-rlhf label create`")
    try:
        connection = _connect(path, "rw")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if application == APPLICATION_ID:
            _upgrade(connection)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError as error:
        raise UserError(f"{path} cannot be opened to read and write: {error}") from error
    except sqlite3.Error as error:
        raise UserError(f"{path} is no labeling project: {error}") from error
    if application != APPLICATION_ID:
        raise UserError(f"{path} is a database of something else, not a labeling project of megatron-rlhf label")
    if version != VERSION:
        raise UserError(f"{path}: a labeling project of version {version}; this program reads version {VERSION}")
    return connection


def _upgrade(connection: sqlite3.Connection) -> None:
    """Version 1 had no messages."""
    if connection.execute("PRAGMA user_version").fetchone()[0] != 1:
        return
    with transaction(connection):
        if connection.execute("PRAGMA user_version").fetchone()[0] == 1:  # nobody else did it meanwhile
            connection.execute("ALTER TABLE tasks ADD COLUMN given TEXT")
            connection.execute(f"PRAGMA user_version = {VERSION}")


def in_memory(source: sqlite3.Connection | None) -> sqlite3.Connection:
    """A copy to try something on; without a source, an empty project."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.row_factory = sqlite3.Row
    if source is not None:
        source.backup(connection)
    else:
        connection.executescript(SCHEMA)
    return connection


def settings(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """What was chosen when the project was made. Raises UserError if the file is damaged."""
    found: dict[str, Any] = {}
    name = "its tables"
    try:
        for row in connection.execute("SELECT name, value FROM settings"):
            name = f"the setting {row['name']}"
            found[row["name"]] = json.loads(row["value"])
    except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {name}: {error}") from error
    return found


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # The page's requests are served one after the other, but not always by the thread that opened the project.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA trusted_schema = OFF")  # triggers and views of a file from elsewhere call nothing
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a click that was answered survives a power cut
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block or nothing; other writers wait."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
