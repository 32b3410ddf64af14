"""Records through the paper's filters, one by one: what stays is written, what goes is counted, and a kill costs little work.

Everything that grows with the data is in an SQLite database beside the output. A transaction ends with the position in the
sources and the sizes of the files written so far: a restart cuts them to these sizes and reads on from there.
"""

import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.examples import read_user
from megatron_rlhf.data.files.text_files import Progress
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.preparation.duplicates import NearDuplicates, digest
from megatron_rlhf.data.preparation.personal import find_personal, form_of, masked
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.splits import place_of

STATE, REPORT, DROPPED = "unfinished.sqlite", "report.json", "dropped.jsonl"
AT_ONCE = 1000
"""Records of a transaction."""
SAMPLES = 5
"""Places shown of each kind of personal data, and of each reason."""


@dataclass(frozen=True)
class Rules:
    """What goes. None: that filter is off."""

    prefix_characters: int | None = 200
    """Of prompts that agree in this many first characters (shorter ones: in all), the first stays (InstructGPT, section 3.2,
    which does not say how many)."""
    near_duplicates: float | None = None
    """Of prompts whose MinHash similarity is at least this, the first stays."""
    max_per_user: int | None = 200
    """Prompts of one user (InstructGPT, section 3.2)."""
    max_characters: int | None = None
    max_tokens: int | None = None
    """The limits of a prompt."""
    personal: str = "drop"
    """Records with personal data: drop, mask (the kind in its place), or keep."""
    region: str | None = "US"
    """Of phone numbers without a country code."""
    shares: tuple[float, ...] = ()
    """Of users in train, validation and test; none: one file, all.jsonl."""
    seed: int = 0
    """Of the split."""

    @property
    def parts(self) -> list[str]:
        return ["train", "validation", "test"][: len(self.shares)] or ["all"]


@dataclass
class Counts:
    """What was read, kept and dropped so far."""

    read: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    personal: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> how many, in how many records, and where a few are, without what they are."""

    def as_json(self) -> dict[str, Any]:
        return {"read": self.read, "parts": dict(self.parts), "dropped": dict(self.dropped), "personal": self.personal}


class Cleaning:
    """One folder of cleaned data."""

    def __init__(
        self, folder: Path, sources: Sequence[str], rules: Rules, shape: Shape, kind: str, about: Mapping[str, Any]
    ):
        """`about`: what else decides the result, such as the tokenizer; a restart must have the same.

        Raises:
            UserError: the folder holds a finished preparation, or one of other settings.
        """
        self.folder, self.sources, self.rules, self.shape, self.kind = folder, list(sources), rules, shape, kind
        self.counts = Counts()
        self.source, self.rows = 0, 0
        if (folder / REPORT).exists():
            raise UserError(f"{folder}: a finished preparation is there ({REPORT}); name another folder, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        names = [*rules.parts, Path(DROPPED).stem]
        if not (folder / STATE).exists():
            for path in (*(folder / f"{name}.jsonl" for name in names), folder / "report.html"):
                if path.exists():
                    raise UserError(f"{path}: is there already, from elsewhere; name another folder")
        self.state = sqlite3.connect(folder / STATE, isolation_level=None)
        self.state.execute("PRAGMA journal_mode=WAL")
        for table in ("meta (key TEXT PRIMARY KEY, value TEXT)", "prefix (hash INTEGER PRIMARY KEY, place TEXT)"):
            self.state.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        self.state.execute("CREATE TABLE IF NOT EXISTS user (name TEXT PRIMARY KEY, prompts INTEGER) WITHOUT ROWID")
        near = rules.near_duplicates
        self.near = None if near is None else NearDuplicates(self.state, near)
        self.settings = json.loads(
            json.dumps({"sources": [_stamp(s) for s in sources], "rules": asdict(rules), **about})
        )
        self.files = {name: (folder / f"{name}.jsonl").open("ab") for name in names}
        self._go_on()

    def run(self, count_tokens: Callable[[str], int] | None = None, progress: Progress | None = None) -> Counts:
        """Reads on to the end, and takes away what only a restart needs."""
        for record, begins in self._records(progress):
            if begins:
                self._commit()
            self.counts.read += 1
            self._sort(record, count_tokens)
            self.rows += 1
            if self.counts.read % AT_ONCE == 0:
                self._commit()
        self._commit()
        for file in self.files.values():
            file.close()
        self.state.close()
        for suffix in ("", "-wal", "-shm"):
            (self.folder / f"{STATE}{suffix}").unlink(missing_ok=True)
        return self.counts

    def _records(self, progress: Progress | None) -> Iterator[tuple[Record, bool]]:
        """The records that are left, and whether one is the first of its source."""
        for number in range(self.source, len(self.sources)):
            done = self.rows if number == self.source else 0
            self.source, self.rows = number, done
            for row, record in enumerate(read_records(self.sources[number], self.shape, progress, self.kind)):
                if row >= done:
                    yield record, row == 0

    def _sort(self, record: Record, count_tokens: Callable[[str], int] | None) -> None:
        """Write the record where it belongs."""
        prompt = text_to_compare(record, self.kind)
        user = read_user(record)
        reason, of = self._reason(record.where, prompt, user, count_tokens)
        fields = dict(record.fields)
        if reason is None and self.rules.personal != "keep":
            fields, found = self._without_personal(record, user)
            reason = "personal_data" if found and self.rules.personal == "drop" else None
        if reason is not None:
            self.counts.dropped[reason] += 1
            self._write(Path(DROPPED).stem, {"where": record.where, "reason": reason, **({"of": of} if of else {})})
            return
        self._remember(record.where, prompt, user)
        shares = self.rules.shares
        part = self.rules.parts[place_of(user, prompt, shares, self.rules.seed) if shares else 0]
        self.counts.parts[part] += 1
        self._write(part, fields)

    def _reason(
        self, where: str, prompt: str, user: str | None, count_tokens: Callable[[str], int] | None
    ) -> tuple[str | None, str | None]:
        """Why the record goes, and which one it repeats."""
        rules = self.rules
        if rules.max_characters is not None and len(prompt) > rules.max_characters:
            return "prompt_too_long", None
        if rules.max_tokens is not None and count_tokens is not None and count_tokens(prompt) > rules.max_tokens:
            return "prompt_too_long", None
        if rules.prefix_characters is not None:
            row = self.state.execute("SELECT place FROM prefix WHERE hash = ?", (self._prefix(prompt),)).fetchone()
            if row is not None:
                return "duplicate", row[0]
        if self.near is not None:
            place, self._signature = self.near.find(prompt)
            if place is not None:
                return "near_duplicate", place
        if user is not None and rules.max_per_user is not None:
            row = self.state.execute("SELECT prompts FROM user WHERE name = ?", (user,)).fetchone()
            if row is not None and row[0] >= rules.max_per_user:
                return "over_user_limit", None
        return None, None

    def _remember(self, where: str, prompt: str, user: str | None) -> None:
        if self.rules.prefix_characters is not None:
            self.state.execute("INSERT OR IGNORE INTO prefix VALUES (?, ?)", (self._prefix(prompt), where))
        if self.near is not None:
            self.near.add(where, self._signature)
        if user is not None:
            self.state.execute(
                "INSERT INTO user VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET prompts = prompts + 1", (user,)
            )

    def _prefix(self, prompt: str) -> int:
        return digest(prompt[: self.rules.prefix_characters].encode())

    def _without_personal(self, record: Record, user: str | None) -> tuple[dict[str, Any], bool]:
        """The fields with personal data masked, and whether there was any. A user's name is replaced by a hash of it."""
        kinds: Counter[str] = Counter()

        def clean(value: Any) -> Any:
            if isinstance(value, str):
                found = find_personal(value, self.rules.region)
                for each in found:
                    kinds[each.kind] += 1
                    self._sample(each.kind, record.where, value[each.start : each.end])
                return masked(value, found)
            if isinstance(value, Mapping):
                cleaned: dict[str, Any] = {}
                for name, item in value.items():
                    cleaned[_free(clean(name), cleaned)] = clean(item)
                return cleaned
            return [clean(item) for item in value] if isinstance(value, list) else value

        fields = {name: clean(value) for name, value in record.fields.items() if name != "user"}
        if "user" in record.fields:
            named = user is not None and find_personal(user, self.rules.region)
            fields["user"] = f"user_{digest(user.encode()) % 2**64:016x}" if user and named else record.fields["user"]
        for kind, count in kinds.items():
            self.counts.personal[kind]["count"] += count
            self.counts.personal[kind]["records"] += 1
        return fields, bool(kinds)

    def _sample(self, kind: str, where: str, text: str) -> None:
        entry = self.counts.personal.setdefault(kind, {"count": 0, "records": 0, "samples": []})
        if len(entry["samples"]) < SAMPLES:
            entry["samples"].append({"where": where, "form": form_of(text)})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self.files[name].write(json.dumps(content, ensure_ascii=False).encode() + b"\n")

    def _commit(self) -> None:
        """All that was done is on disk, and the next transaction begins."""
        sizes = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        kept = {"source": self.source, "rows": self.rows, "sizes": sizes, "counts": self.counts.as_json()}
        for key, value in (("settings", self.settings), ("position", kept)):
            self.state.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
        self.state.execute("COMMIT")
        self.state.execute("BEGIN")

    def _go_on(self) -> None:
        """From where an earlier run was stopped, if there was one."""
        meta = dict(self.state.execute("SELECT key, value FROM meta").fetchall())
        if "position" in meta:
            before = json.loads(meta["settings"])
            if changed := [key for key in self.settings if before.get(key) != self.settings[key]]:
                raise UserError(
                    f"{self.folder}: holds an unfinished preparation with other {', '.join(changed)}; go on with the same, or "
                    "name another folder"
                )
            position = json.loads(meta["position"])
            self.source, self.rows = position["source"], position["rows"]
            counts = position["counts"]
            self.counts = Counts(
                counts["read"], Counter(counts["parts"]), Counter(counts["dropped"]), counts["personal"]
            )
            sizes = position["sizes"]
        else:
            sizes = dict.fromkeys(self.files, 0)
        for name, size in sizes.items():
            self.files[name].truncate(size)
        self.state.execute("BEGIN")


def text_to_compare(record: Record, kind: str) -> str:
    """What a record asks, as text; of a pair of dialogues, what they begin with."""
    column = next((name for name in ("prompt", "messages", "text", "chosen") if name in record), "prompt")
    value = record.value(column)
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        while turns and turns[-1].get("role") == "assistant" and column != "prompt":
            turns.pop()
        return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return record.as_text(column, value)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number where another has it: two addresses are both `<email>`."""
    numbered = (f"{name} {number}" if number > 1 else name for number in itertools.count(1))
    return next(each for each in numbered if each not in taken)


def _stamp(source: str) -> list[Any]:
    path = Path(source).expanduser()
    return [source, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [source]
