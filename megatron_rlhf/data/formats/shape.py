"""The shape of a user's records: how to make ours of them. A format is a YAML file; `data.columns` is the same, in one line."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.dialogues import Dialogue
from megatron_rlhf.data.formats.makers import Maker, maker
from megatron_rlhf.data.formats.record import Record, nearest
from megatron_rlhf.data.formats.trees import Tree

READ = (
    "prompt", "response", "messages", "responses", "ranks", "chosen", "rejected", "completion", "user", "text", "tools",
    "chat_template_kwargs",
)  # fmt: skip
"""The columns that are read, all kinds of records together."""
OURS = {"prompt", "responses", "ranks"}
KNOWN = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Shape:
    """Makes our records of others."""

    columns: Mapping[str, Maker] = field(default_factory=dict)
    tree: Tree | None = None
    dialogue: Dialogue | None = None
    known: bool = False
    """A published format: what is missing in its files is counted, and no mistake of the user's."""
    chat: bool = False
    """Texts are turns of a conversation."""

    @classmethod
    def of(cls, format: str | None = None, columns: Mapping[str, Any] | None = None, chat: bool = False) -> "Shape":
        """The shape that a format and templates for columns describe; the templates take precedence.

        Raises:
            UserError: there is no such format, or what describes it is wrong.
        """
        found = cls() if format is None else _read(format)
        made = {**found.columns, **_makers(columns or {})}
        return cls(made, found.tree, found.dialogue, format is not None, chat)

    def records(self, rows: Iterable[Record], kind: str | None) -> Iterator[Record]:
        """Our records. `kind`: demonstrations, comparisons or prompts, which differ in what they take of a tree or a pair."""
        if self.tree is not None:
            rows = self.tree.records(rows, kind, self.chat)
        for row in rows:
            if self.known and made_of(row) >= OURS:  # converted already
                yield self._as_kind(row, kind)
                continue
            made = {name: make(row) for name, make in self.columns.items()}
            record = Record(row.where, {**row.fields, **made}, self.known) if made or self.known else row
            if self.dialogue is not None or self.chat:
                record = (self.dialogue or Dialogue()).split(record, self.chat)
            yield self._as_kind(record, kind)

    def _as_kind(self, record: Record, kind: str | None) -> Record:
        if self.known and kind != "comparisons":
            record = _best_response(record)
        prompt = record.fields.get("prompt")
        if self.chat and isinstance(prompt, str) and "messages" not in record:
            turn = {"role": "user", "content": record.as_text("prompt", prompt).rstrip("\n")}
            return Record(record.where, {**record.fields, "prompt": [turn]}, record.lenient)
        return record


def made_of(record: Record) -> set[str]:
    """The columns that are not null."""
    return {name for name in record.fields if name in record}


def _best_response(record: Record) -> Record:
    """Of a ranking, the best response is a demonstration, and its conversation a prompt."""
    fields, there = record.fields, made_of(record)
    if there & {"response", "completion", "messages"}:
        return record
    responses, ranks = fields.get("responses"), fields.get("ranks")
    if isinstance(responses, list) and isinstance(ranks, list) and ranks:
        if len(ranks) != len(responses) or not all(type(rank) is int for rank in ranks):
            raise record.mistake(
                f"column 'ranks' must hold a whole number for each of {len(responses)} responses, not {ranks!r:.60}"
            )
        return Record(record.where, {**fields, "response": responses[ranks.index(min(ranks))]}, record.lenient)
    if "chosen" in there:
        whole = isinstance(fields["chosen"], list) and "prompt" not in there
        return Record(record.where, {**fields, "messages" if whole else "response": fields["chosen"]}, record.lenient)
    return record


def known_formats() -> list[str]:
    """Names that `data.format` accepts."""
    return sorted(path.stem for path in KNOWN.glob("*.yaml"))


def _makers(columns: Mapping[str, Any]) -> dict[str, Maker]:
    """Columns of any name may be made, as for reward functions; but none whose name is nearly that of one that is read."""
    for name in columns:
        meant = difflib.get_close_matches(str(name), READ, n=1, cutoff=0.82)
        if not isinstance(name, str) or (name not in READ and meant):
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            raise UserError(f"columns.{name}: no such column is read{hint}; there are: {', '.join(READ)}")
    return {name: maker(name, each) for name, each in columns.items()}


def _read(format: str) -> Shape:
    path = KNOWN / f"{format}.yaml"
    if not path.is_file():
        path = Path(format).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"data.format={format}: no known format{nearest(format, known_formats())}; there are: "
                f"{', '.join(known_formats())}; or a YAML file of your own"
            )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"data.format={format}: {path} cannot be read: {str(error).splitlines()[0]}") from error
    parts = {"about", "columns", "tree", "dialogue"}
    if not isinstance(found, dict) or not found.keys() <= parts or not isinstance(found.get("columns", {}), dict):
        raise UserError(f"data.format={format}: {path} must hold some of {', '.join(sorted(parts))}")
    for name, described in (("tree", Tree), ("dialogue", Dialogue)):
        given = found.get(name, {})
        if not isinstance(given, dict) or not given.keys() <= described.__dataclass_fields__.keys():
            expected = ", ".join(described.__dataclass_fields__)
            raise UserError(f"data.format={format}: {path}: {name} must hold {expected}")
    try:
        return Shape(
            _makers(found.get("columns", {})),
            Tree(**found["tree"]) if "tree" in found else None,
            Dialogue(**found["dialogue"]) if "dialogue" in found else None,
        )
    except UserError as error:
        raise UserError(f"data.format={format}: {path}: {error}") from error
