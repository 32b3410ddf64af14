"""Near-duplicates among millions of texts, in bounded memory: signatures and their buckets are in an SQLite database."""

import hashlib
import re
import sqlite3

import numpy as np
from datasketch import MinHash

PERMUTATIONS = 128
BAND = 4
"""Hashes of a bucket's key: two texts of similarity s share one of 32 buckets with probability 1 - (1 - s^4)^32, 0.99 at 0.6."""
SHINGLE = 5
"""Characters: short prompts have few words."""


class NearDuplicates:
    """Texts seen so far, and which of them a new one is nearly the same as."""

    def __init__(self, database: sqlite3.Connection, threshold: float):
        """`threshold`: Jaccard similarity of the sets of shingles, as MinHash estimates it."""
        assert 0 < threshold <= 1, threshold
        self._database, self._threshold = database, threshold
        database.execute("CREATE TABLE IF NOT EXISTS signature (id INTEGER PRIMARY KEY, place TEXT, hashes BLOB)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS bucket (key INTEGER, id INTEGER, PRIMARY KEY (key, id)) WITHOUT ROWID"
        )

    def find(self, text: str) -> tuple[str | None, np.ndarray]:
        """(place of a kept text that is nearly the same, if there is one; the text's signature)."""
        hashes = _signature(text)
        keys = _keys(hashes)
        marks = ",".join("?" * len(keys))
        rows = self._database.execute(
            f"SELECT DISTINCT place, hashes FROM bucket JOIN signature USING (id) WHERE key IN ({marks}) ORDER BY id",
            keys,
        )
        for place, stored in rows:
            if np.mean(np.frombuffer(stored, dtype=np.uint32) == hashes) >= self._threshold:
                return place, hashes
        return None, hashes

    def add(self, place: str, hashes: np.ndarray) -> None:
        """Keep a text."""
        id = self._database.execute(
            "INSERT INTO signature (place, hashes) VALUES (?, ?)", (place, hashes.tobytes())
        ).lastrowid
        self._database.executemany("INSERT OR IGNORE INTO bucket VALUES (?, ?)", ((key, id) for key in _keys(hashes)))


def _signature(text: str) -> np.ndarray:
    plain = re.sub(r"\s+", " ", text.casefold()).strip()
    shingles = {plain[i : i + SHINGLE] for i in range(max(len(plain) - SHINGLE + 1, 1))}
    minhash = MinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return np.asarray(minhash.hashvalues).astype(np.uint32)


def _keys(hashes: np.ndarray) -> list[int]:
    return [digest(f"{band}".encode() + hashes[band : band + BAND].tobytes()) for band in range(0, PERMUTATIONS, BAND)]


def digest(content: bytes) -> int:
    """A hash that is the same everywhere, as SQLite stores integers."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
