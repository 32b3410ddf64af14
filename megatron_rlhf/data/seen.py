"""What has been seen among millions of records, in bounded memory."""

import hashlib
import sqlite3

MEMORY_KB = 65536


class Seen:
    """How often each key was seen, in a temporary database, most of which is on the disk where it is large."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{MEMORY_KB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction that never ends

    def count(self, key: bytes) -> int:
        found = self._database.execute("SELECT count FROM seen WHERE key = ?", (_digest(key),)).fetchone()
        return found[0] if found else 0

    def add(self, key: bytes) -> None:
        self._database.execute(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET count = count + 1", (_digest(key),)
        )


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()
