"""Rankings of K responses from pairwise votes, and back, for whole files; in an SQLite database where they are many."""

import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rlhf.data.formats.ranked import responses_and_ranks
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.votes import Cycle, ranks_from_votes, votes_from_ranks
from megatron_rlhf.data.preparation.duplicates import digest


@dataclass
class RankingCounts:
    """What became of the votes."""

    votes: int = 0
    rankings: int = 0
    """Of three responses or more, with every vote in them."""
    pairs: int = 0
    """Votes that stay pairs: a ranking would say more than they do."""
    ties: int = 0
    cycles: list[str] = field(default_factory=list)
    """Where, and how votes go in a circle: nothing is made of them."""


def rankings_from_pairs(
    records: Iterable[Record], database: sqlite3.Connection, counts: RankingCounts
) -> Iterator[dict[str, Any]]:
    """One record for the responses of a prompt that votes connect, in the order in which prompts first occur.

    A record is {"prompt", "chosen", "rejected"}, and a vote; those of a pair add up. Votes become a ranking if they decide every
    pair that the ranking does, directly or through others; else they stay pairs.
    """
    database.execute("CREATE TABLE vote (prompt INTEGER, number INTEGER, place TEXT, content TEXT)")
    for number, record in enumerate(records):
        content = {name: record.value(name) for name in ("prompt", "chosen", "rejected")}
        prompt = json.dumps(content["prompt"], sort_keys=True)
        counts.votes += 1
        row = digest(prompt.encode()), number, record.where, json.dumps(content)
        database.execute("INSERT INTO vote VALUES (?, ?, ?, ?)", row)
    database.execute("CREATE INDEX by_prompt ON vote (prompt, number)")
    order = "SELECT prompt, MIN(number) AS first FROM vote GROUP BY prompt ORDER BY first"
    for prompt, _ in database.execute(order):
        rows = database.execute(
            "SELECT place, content FROM vote WHERE prompt = ? ORDER BY number", (prompt,)
        ).fetchall()
        yield from _of_prompt([(place, json.loads(content)) for place, content in rows], counts)


def _of_prompt(rows: list[tuple[str, Mapping[str, Any]]], counts: RankingCounts) -> Iterator[dict[str, Any]]:
    texts: dict[str, int] = {}
    responses: list[Any] = []
    votes = []
    for _, content in rows:
        pair = []
        for name in ("chosen", "rejected"):
            key = json.dumps(content[name], sort_keys=True)
            if key not in texts:
                texts[key] = len(responses)
                responses.append(content[name])
            pair.append(texts[key])
        votes.append((pair[0], pair[1], 1))
    prompt = rows[0][1]["prompt"]
    for members in _connected(len(responses), votes):
        place = {member: i for i, member in enumerate(members)}
        inside = [(place[a], place[b], vote) for a, b, vote in votes if a in place and a != b]
        try:
            ranks = ranks_from_votes(len(members), inside)
        except Cycle as cycle:
            counts.cycles.append(f"{rows[0][0]}: {cycle}, of {len(members)} responses")
            continue
        made = {"prompt": prompt, "responses": [responses[member] for member in members], "ranks": ranks}
        if len(set(ranks)) == 1:
            counts.ties += 1
        elif len(members) > 2 and _all_decided(ranks, inside):
            counts.rankings += 1
            yield made
        else:
            for better, worse in _decided(inside):
                counts.pairs += 1
                yield {"prompt": prompt, "responses": [made["responses"][i] for i in (better, worse)], "ranks": [0, 1]}


def _connected(count: int, votes: Iterable[tuple[int, int, int]]) -> list[list[int]]:
    """Responses that votes connect, without those that stand alone."""
    group = list(range(count))
    for a, b, _ in votes:
        old, new = group[b], group[a]
        group = [new if g == old else g for g in group]
    members = [[i for i in range(count) if group[i] == g] for g in dict.fromkeys(group)]
    return [each for each in members if len(each) > 1]


def _decided(votes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(better, worse) of each pair with a majority."""
    balance: dict[tuple[int, int], int] = {}
    for a, b, vote in votes:
        pair, sign = ((a, b), 1) if a < b else ((b, a), -1)
        balance[pair] = balance.get(pair, 0) + sign * vote
    return [(a, b) if vote > 0 else (b, a) for (a, b), vote in balance.items() if vote]


def _all_decided(ranks: list[int], votes: list[tuple[int, int, int]]) -> bool:
    """Whether the votes decide every pair of different ranks, directly or through others."""
    count = len(ranks)
    better = [[False] * count for _ in range(count)]
    for a, b in _decided(votes):
        better[a][b] = True
    for middle, a, b in itertools.product(range(count), repeat=3):
        better[a][b] |= better[a][middle] and better[middle][b]
    return all(better[a][b] for a in range(count) for b in range(count) if ranks[a] < ranks[b])


def pairs_from_ranking(record: Record, counts: RankingCounts) -> Iterator[dict[str, Any]]:
    """A pairwise vote for each pair of responses that does not tie."""
    prompt, (responses, ranks) = record.value("prompt"), responses_and_ranks(record)
    counts.rankings += 1
    for a, b, vote in votes_from_ranks(ranks):
        if vote:
            counts.pairs += 1
            better, worse = (a, b) if vote > 0 else (b, a)
            yield {"prompt": prompt, "chosen": responses[better], "rejected": responses[worse]}
        else:
            counts.ties += 1
