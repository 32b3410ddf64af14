"""A reward model on people's comparisons: every response is scored once, and each labeler's ranking stays its own."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from megatron_rlhf.data.comparisons import Ranking
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.evaluation.reward_accuracy import Pair, accuracy, accuracy_by, group_name, pairs_of
from megatron_rlhf.models.microbatches import texts_to_score
from megatron_rlhf.models.roles import Role

AT_ONCE = 256
"""Responses in one pass: bounds the padding, does not affect the numbers."""
GROUP_COLUMNS = ("team", "subset")
"""Who ranked (megatron-rlhf label), or the part of a benchmark (RewardBench)."""


def judged(reward: Role, rankings: Sequence[tuple[Record, Ranking]], micro_batch_size: int) -> list[dict[str, Any]]:
    """A row for each ranking, as `reward_accuracy.pairs_of` takes them: {"prompt" (a number), "labeler", "group", "ranks",
    "scores", "lengths" (tokens)}."""
    prompts: dict[bytes, int] = {}
    rows = []
    for part in _parts(rankings):
        texts = [[*r.prompt.tolist(), *response.tolist()] for _, r in part for response in r.responses]
        lengths = [len(r.prompt) for _, r in part for _ in r.responses]
        index = [i for i, (_, r) in enumerate(part) for _ in r.responses]
        scores = iter(reward.scores(texts_to_score(texts, lengths, index), micro_batch_size).tolist())
        for record, ranking in part:
            rows.append(
                {
                    "prompt": prompts.setdefault(ranking.prompt.tobytes(), len(prompts)),
                    "labeler": record.fields.get("labeler"),
                    "group": group_of(record),
                    "ranks": list(ranking.ranks),
                    "scores": [next(scores) for _ in ranking.ranks],
                    "lengths": [len(response) for response in ranking.responses],
                }
            )
    return rows


def group_of(record: Record) -> str | None:
    """Raises UserError where it is no name."""
    for column in GROUP_COLUMNS:
        value = record.fields.get(column)
        if isinstance(value, list | dict):
            raise record.mistake(f"column {column!r} must hold the name of a group, not {value!r:.60}")
        if (group := group_name(value)) is not None:
            return group
    return None


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy as a share, with its standard error over prompts: of all pairs, by K and by group."""
    pairs: list[Pair] = pairs_of(rows)
    found = {"": accuracy(pairs)}
    found |= {f"_k{k}": value for k, value in accuracy_by(pairs, lambda pair: pair.k).items()}
    groups = accuracy_by(pairs, lambda pair: pair.group)
    if len(groups) > 1:
        taken = {*found, "_error"}
        found |= {f"_group_{name}" if f"_{name}" in taken else f"_{name}": value for name, value in groups.items()}
    metrics = {f"rm/accuracy{name}": value.mean / 100 for name, value in found.items()}
    return {**metrics, "rm/accuracy_error": found[""].error / 100}


def _parts(rankings: Sequence[tuple[Record, Ranking]]) -> Iterator[Sequence[tuple[Record, Ranking]]]:
    ends = list(accumulate(len(ranking.ranks) for _, ranking in rankings))
    start = 0
    while start < len(rankings):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, sum(end - before <= AT_ONCE for end in ends))
        yield rankings[start:stop]
        start = stop
