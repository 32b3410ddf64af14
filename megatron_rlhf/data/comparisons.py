"""Comparisons for the reward model: a prompt and the responses that labelers ranked."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rlhf.data.examples import Examples, read_prompt, read_user
from megatron_rlhf.data.records import Record, read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens

ASSISTANT_TURN = "\n\nAssistant:"


Ranked = tuple[Sequence[Tokens], Sequence[int]]
"""Responses that were ranked together, and their ranks: 0 is the best, equal ranks are a tie."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """All comparisons of one prompt: one element of a reward model batch, however many records and pairs it comes from."""

    prompt_tokens: Tokens
    responses_tokens: tuple[Tokens, ...]
    """Each distinct response and the token that ends it, at which the score of prompt + response is read."""

    pairs: npt.NDArray[np.int64]
    """[q, 3], one row per strict preference: indices of the better and of the worse response, and how many responses
    were ranked together. At least one row."""

    best: tuple[int, ...]
    """Index of the best response of each record."""

    users: frozenset[str] = frozenset()
    """Who wrote the prompt, if records say so."""

    @classmethod
    def of(cls, prompt_tokens: Tokens, rankings: Iterable[Ranked], users: Iterable[str] = ()) -> "Comparison":
        """Made from one prompt's rankings. A response that occurs in several of them is kept once; responses are
        compared with those that they were ranked with, and never with themselves."""
        places: dict[bytes, int] = {}
        distinct: list[Tokens] = []
        pairs: list[tuple[int, int, int]] = []
        best: list[int] = []
        for responses, ranks in rankings:
            entries = []
            for response, rank in zip(responses, ranks, strict=True):
                place = places.setdefault(response.tobytes(), len(distinct))
                if place == len(distinct):
                    distinct.append(response)
                entries.append((rank, place))
            entries.sort(key=lambda entry: entry[0])
            best.append(entries[0][1])
            pairs += [
                (better, worse, len(ranks))
                for (high, better), (low, worse) in itertools.combinations(entries, 2)
                if high < low and better != worse
            ]
        return cls(prompt_tokens, tuple(distinct), np.array(pairs).reshape(-1, 3), tuple(best), frozenset(users))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all responses."""
        return len(self.prompt_tokens) + sum(map(len, self.responses_tokens))


@dataclass(frozen=True)
class _Record:
    """A record before it is tokenised."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    user: str | None


def load_comparisons(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_length: int,
    columns: Mapping[str, str] | None = None,
) -> Examples[Comparison]:
    """Reads records of any of three formats; `source`, `columns` and the limits as in `load_demonstrations`.

    {"prompt", "responses": [...], "ranks": [...]} with rank 0 = best and equal = tie; {"prompt", "chosen", "rejected"};
    or hh-rlhf's {"chosen", "rejected"}, two dialogues that diverge after a "\\n\\nAssistant:".

    Records of the same prompt become one item. A column `user` (optional) says who wrote the prompt.

    Dropped and counted: records as `prompt_too_long`; single responses as `response_too_long` or `total_too_long`, and the
    record as `too_few_responses` if no strict pair is left; records in which all tie as `all_tied`, those whose responses
    are all the same text as `equal_responses`; and dialogues of hh-rlhf that end without an answer, as some of the
    published ones do, as `empty_response`.

    Raises:
        UserError: A mistake in the source, with its line, or nothing left.
    """
    dropped: Counter[str] = Counter()
    records: list[_Record] = []
    for found in read_records(source, columns):
        record = _read_record(found, tokenizer)
        if not all(response.strip() for response in record.responses):
            dropped["empty_response"] += 1
        elif len(set(record.responses)) == 1:
            dropped["equal_responses"] += 1
        elif len(set(record.ranks)) == 1:
            dropped["all_tied"] += 1
        else:
            records.append(record)
    prompts = tokenizer.encode_stream((record.prompt for record in records), bos=True)
    responses = tokenizer.encode_stream(
        (response for record in records for response in record.responses), continuation=True
    )
    together: dict[bytes, tuple[Tokens, list[Ranked], set[str]]] = {}
    for record, prompt in zip(records, prompts, strict=True):
        ended = [np.append(next(responses), np.int32(tokenizer.end_id)) for _ in record.responses]
        if len(prompt) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
            continue
        kept = []
        for response, rank in zip(ended, record.ranks, strict=True):
            if len(response) > max_response_tokens:
                dropped["response_too_long"] += 1
            elif len(prompt) + len(response) > max_length:
                dropped["total_too_long"] += 1
            else:
                kept.append((response, rank))
        if len({rank for _, rank in kept}) < 2 or len({response.tobytes() for response, _ in kept}) < 2:
            dropped["too_few_responses"] += 1
            continue
        _, rankings, users = together.setdefault(prompt.tobytes(), (prompt, [], set()))
        rankings.append(([response for response, _ in kept], [rank for _, rank in kept]))
        if record.user is not None:
            users.add(record.user)
    items = [Comparison.of(*parts) for parts in together.values()]
    return Examples(str(source), items, dropped, records=sum(len(rankings) for _, rankings, _ in together.values()))


def _read_record(record: Record, tokenizer: Tokenizer) -> _Record:
    if "responses" in record or not ("chosen" in record or "rejected" in record):
        return _ranked_list(record, tokenizer)
    if "prompt" in record:
        pair = record.response("chosen"), record.response("rejected")
        return _Record(read_prompt(record, tokenizer), pair, (0, 1), read_user(record))
    return _dialogue_pair(record)


def _ranked_list(record: Record, tokenizer: Tokenizer) -> _Record:
    responses, ranks = record.value("responses"), record.value("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise record.mistake(f"column 'responses' must be a list of two texts or more, not {responses!r:.60}")
    if not isinstance(ranks, list) or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise record.mistake(f"column 'ranks' must be a list of whole numbers from 0 (the best) up, not {ranks!r:.60}")
    if len(ranks) != len(responses):
        raise record.mistake(
            f"column 'ranks' has {len(ranks)} numbers for {len(responses)} responses; one each is needed"
        )
    texts = tuple(record.as_response("responses", response) for response in responses)
    return _Record(read_prompt(record, tokenizer), texts, tuple(ranks), read_user(record))


def _dialogue_pair(record: Record) -> _Record:
    chosen, rejected = record.text("chosen"), record.text("rejected")
    turn = chosen.rfind(ASSISTANT_TURN)
    while turn >= 0 and not rejected.startswith(chosen[: turn + len(ASSISTANT_TURN)]):
        turn = chosen.rfind(ASSISTANT_TURN, 0, turn)
    if turn < 0:
        raise record.mistake(
            f"'chosen' and 'rejected' share no {ASSISTANT_TURN!r}, so where the response starts is unknown; "
            "add a column 'prompt'"
        )
    end = turn + len(ASSISTANT_TURN)
    return _Record(chosen[:end], (chosen[end:], rejected[end:]), (0, 1), read_user(record))
