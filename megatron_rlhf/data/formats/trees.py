"""Trees of messages, as Open Assistant publishes them: a prompt, its replies, their replies, and so on, some of them ranked."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record


@dataclass(frozen=True)
class Tree:
    """The names in such files. A row is a tree, or a message that names its parent; those of a tree follow each other."""

    root: str = "prompt"
    text: str = "text"
    role: str = "role"
    replies: str = "replies"
    rank: str = "rank"
    id: str = "message_id"
    parent: str = "parent_id"
    tree: str = "message_tree_id"
    roles: Mapping[str, str] = field(default_factory=lambda: {"prompter": "user", "assistant": "assistant"})
    mark: str = "{role}:"
    """Before each turn, where the conversation is text."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "roles" and not isinstance(value := getattr(self, each.name), str):
                raise UserError(f"tree: {each.name} must be text, not {value!r:.60}")
        texts = isinstance(self.roles, Mapping) and all(
            isinstance(name, str) for pair in self.roles.items() for name in pair
        )
        if not texts or not {"user", "assistant"} <= set(self.roles.values()):
            raise UserError(
                f"tree: roles must say which are user and assistant, as {{prompter: user}}, not {self.roles!r:.60}"
            )
        if self.mark.replace("{role}", "").count("{"):
            raise UserError(f"tree: mark may hold {{role}}, and no other name in braces, not {self.mark!r:.60}")

    def records(self, rows: Iterable[Record], kind: str | None, chat: bool) -> Iterator[Record]:
        """Every turn of the user's with its answers: a prompt, a demonstration (the best answer), a comparison (all that are
        ranked, if there are two). A row with a prompt of text is one already."""
        for tree, group in groupby(rows, key=lambda row: row.fields.get(self.tree, row.where)):
            members = list(group)
            if isinstance(members[0].fields.get(self.root), str):
                yield from members
                continue
            where = members[0].where if len(members) == 1 else f"{members[0].where}, tree {tree}"
            for root in self._roots(members):
                yield from self._below(Record(where, members[0].fields, True), root, [], kind, chat)

    def _roots(self, members: list[Record]) -> list[Mapping[str, Any]]:
        if len(members) == 1 and isinstance(members[0].fields.get(self.root), Mapping):
            return [members[0].fields[self.root]]
        nodes = {self._name(row, self.id): {**row.fields, self.replies: []} for row in members}
        roots: list[Mapping[str, Any]] = []
        for row in members:
            node = nodes[row.fields[self.id]]
            parent = self._name(row, self.parent) if self.parent in row else None
            if parent is None:
                roots.append(node)
            elif parent in nodes:
                nodes[parent][self.replies].append(node)
            else:
                raise row.mistake(
                    f"{self.parent} {parent!r} is not among the messages of its tree, which must follow each other"
                )
        return roots

    def _below(
        self, source: Record, node: Mapping[str, Any], path: list[dict[str, str]], kind: str | None, chat: bool
    ) -> Iterator[Record]:
        path = [*path, self._turn(source, node)]
        replies = self._replies(source, node)
        if path[-1]["role"] == "user":
            ranks = [(rank, reply) for reply in replies if (rank := self._rank(source, reply)) is not None]
            ranks.sort(key=lambda pair: pair[0])
            ranked = [reply for _, reply in ranks]
            wanted = {"comparisons": len(ranked) > 1, "demonstrations": bool(replies)}
            if wanted.get(kind or "", True):
                answers = [self._turn(source, reply)["content"] for reply in ranked or replies[:1]]
                yield self._record(source, path, answers, [rank for rank, _ in ranks], chat)
        for reply in replies:
            yield from self._below(source, reply, path, kind, chat)

    def _replies(self, source: Record, node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Those that were not deleted."""
        replies = node.get(self.replies) or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise source.mistake(f"{self.replies!r} must be a list of messages, not {replies!r:.60}")
        return [reply for reply in replies if not reply.get("deleted")]

    def _rank(self, source: Record, reply: Mapping[str, Any]) -> int | None:
        rank = reply.get(self.rank)
        whole = isinstance(rank, int | float) and not isinstance(rank, bool) and rank == int(rank)
        if rank is not None and not whole:
            raise source.mistake(f"{self.rank!r} must be a whole number, 0 for the best, or null, not {rank!r:.60}")
        return None if rank is None else int(rank)

    @staticmethod
    def _name(row: Record, column: str) -> str | int:
        name = row.value(column)
        if not isinstance(name, str | int):
            raise row.mistake(f"column {column!r} must name a message, not {name!r:.60}")
        return name

    def _record(
        self, source: Record, path: list[dict[str, str]], answers: list[str], ranks: list[int], chat: bool
    ) -> Record:
        names = {role: name for name, role in self.roles.items()}
        lines = [f"{self._mark(names[turn['role']])} {turn['content']}" for turn in path]
        prompt = path if chat else "\n\n".join([*lines, self._mark(names["assistant"])])
        responses = answers if chat else [f" {answer}" for answer in answers]
        made = {
            "prompt": prompt,
            "response": responses[0] if responses else None,
            "responses": responses,
            "ranks": ranks,
        }
        user = source.fields.get("user_id")
        return Record(source.where, {**made, "user": user if isinstance(user, str) else None}, True)

    def _mark(self, role: str) -> str:
        return self.mark.replace("{role}", role)

    def _turn(self, source: Record, node: Any) -> dict[str, str]:
        if not isinstance(node, Mapping) or not isinstance(node.get(self.text), str):
            raise source.mistake(f"a message must be an object with text in {self.text!r}, not {node!r:.60}")
        role = node.get(self.role)
        if not isinstance(role, str) or role not in self.roles:
            raise source.mistake(f"{self.role} {role!r} is none of {', '.join(self.roles)}")
        return {"role": self.roles[role], "content": node[self.text]}
