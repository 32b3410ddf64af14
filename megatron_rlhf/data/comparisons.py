"""Comparisons for the reward model: a prompt and the responses that labelers ranked."""

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rlhf.data.chat.messages import Conversation
from megatron_rlhf.data.chat.template import Chat
from megatron_rlhf.data.examples import Examples, length_limits, require_prompt, require_response, windows
from megatron_rlhf.data.files.item_store import IN_MEMORY, Chosen, InMemory
from megatron_rlhf.data.formats.ranked import RankedRecord, known_flaw, read_ranked
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.records import Columns, read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens

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


def load_comparisons(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_length: int,
    columns: Columns = None,
    into: InMemory = IN_MEMORY,
) -> Examples[Comparison]:
    """Reads records of any of three formats; `source`, `columns` and the limits as in `load_demonstrations`.

    {"prompt", "responses": [...], "ranks": [...]} with rank 0 = best and equal = tie; {"prompt", "chosen", "rejected"};
    or hh-rlhf's {"chosen", "rejected"}, two dialogues that diverge after a "\\n\\nAssistant:". Prompts and responses may be
    messages (a prompt also as `messages`), and `chosen` and `rejected` whole conversations that begin alike, as TRL has them.

    Records of the same prompt become one item. A column `user` (optional) says who wrote the prompt.

    Dropped and counted, in records: `prompt_too_long`; `response_too_long` or `total_too_long` where so many responses are
    that no strict pair is left (in the records that stay, such responses are left out and counted apart); `all_tied`;
    `equal_responses` that are all the same text; `cyclic_votes` that no ranking agrees with; and dialogues that end without an
    answer, as some of the published ones of hh-rlhf do, as `empty_response`.

    Raises:
        UserError: A mistake in the source, with its line, or nothing left.
    """
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    prompts = array("Q")

    most = max_prompt_tokens, max_response_tokens, max_length

    def read() -> Iterator[Ranking]:
        for _, ranking in _rankings(
            read_records(source, columns, into.progress, "comparisons"), tokenizer, most, dropped, left_out
        ):
            prompts.frombytes(hashlib.blake2b(ranking.prompt.tobytes(), digest_size=16).digest())
            yield ranking

    rankings = into.spill(Ranking)(read())
    items = into(map(_together, (Chosen(rankings, group) for group in _alike(prompts))))
    limits = length_limits(max_prompt_tokens, max_response_tokens, max_length)
    return Examples(str(source), items, dropped, limits, len(rankings), left_out)


def load_rankings(
    source: str | Path, tokenizer: Tokenizer, max_prompt_tokens: int, max_length: int, columns: Columns = None
) -> list[tuple[Record, "Ranking"]]:
    """The records of `load_comparisons` one by one, as labelers made them, and what is kept of each. Raises UserError."""
    dropped, left_out, most = Counter[str](), Counter[str](), (max_prompt_tokens, max_length, max_length)
    records = read_records(source, columns, kind="comparisons")
    items = list(_rankings(records, tokenizer, most, dropped, left_out))
    limits = length_limits(*most)
    Examples(str(source), items, dropped, limits, left_out=left_out).report()
    return items


def _rankings(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    most: tuple[int, int, int],
    dropped: Counter[str],
    left_out: Counter[str],
) -> Iterator[tuple[Record, "Ranking"]]:
    """Each usable record, and what is kept of it within the limits (`most`: of a prompt, a response, both)."""
    for found in windows(records):
        usable = [record for each in found if (record := _usable(each, dropped)) is not None]
        for record, prompt, ended in _tokenized(usable, tokenizer):
            if len(prompt) > most[0]:
                dropped["prompt_too_long"] += 1
                continue
            kept, missing = [], Counter[str]()
            for response, rank in zip(ended, record.ranks, strict=True):
                if len(response) > most[1]:
                    missing["response_too_long"] += 1
                elif len(prompt) + len(response) > most[2]:
                    missing["total_too_long"] += 1
                else:
                    kept.append((response, rank))
            if len({rank for _, rank in kept}) < 2 or len({response.tobytes() for response, _ in kept}) < 2:
                dropped[max(missing, key=lambda reason: missing[reason], default="equal_responses")] += 1
                continue
            left_out.update(missing)
            responses, ranks = zip(*kept, strict=True)
            yield record.found, Ranking(prompt, responses, ranks, record.user)


@dataclass(frozen=True)
class Ranking:
    """A record after it is tokenised: what is kept of it."""

    prompt: Tokens
    responses: tuple[Tokens, ...]
    ranks: tuple[int, ...]
    user: str | None


def _together(rankings: Sequence[Ranking]) -> Comparison:
    """One prompt's rankings as one item."""
    read = list(rankings)
    users = {ranking.user for ranking in read if ranking.user is not None}
    return Comparison.of(read[0].prompt, [(ranking.responses, ranking.ranks) for ranking in read], users)


def _alike(prompts: array) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of equal prompts (two numbers each), in the order in which they first occur."""
    _, first, group = np.unique(
        np.frombuffer(prompts, np.uint64).reshape(-1, 2), axis=0, return_index=True, return_inverse=True
    )
    place = np.empty_like(first)
    place[np.argsort(first)] = np.arange(len(first))
    place = place[group.reshape(-1)]
    order = np.argsort(place, kind="stable")
    begin = 0
    for end in np.cumsum(np.bincount(place)):
        yield order[begin:end]
        begin = end


def _usable(found: Record, dropped: Counter[str]) -> RankedRecord | None:
    """What a record holds; None, and counted, where nothing can be learned from it."""
    if found.lenient and (reason := known_flaw(found)):
        dropped[reason] += 1
        return None
    record = read_ranked(found)
    if record.has_empty:
        dropped["empty_response"] += 1
    elif record.all_equal:
        dropped["equal_responses"] += 1
    elif len(set(record.ranks)) == 1:
        dropped["all_tied"] += 1
    else:
        return record
    return None


def _tokenized(
    records: Sequence[RankedRecord], tokenizer: Tokenizer
) -> Iterator[tuple[RankedRecord, Tokens, list[Tokens]]]:
    """Each record with the tokens of its prompt and of its responses, ends included."""
    texts = [record for record in records if isinstance(record.prompt, str)]
    prompts = tokenizer.encode_stream((str(record.prompt) for record in texts), bos=True)
    responses = tokenizer.encode_stream((str(r) for record in texts for r in record.responses), continuation=True)
    chat = Chat(tokenizer)
    for record in records:
        if isinstance(record.prompt, Conversation):
            completions = [response for response in record.responses if not isinstance(response, str)]
            prompt, ended = chat.answers(record.prompt, completions)
            require_prompt(record.found, "", prompt)
            yield record, prompt, ended
        else:
            end = np.int32(tokenizer.end_id)
            prompt, answers = next(prompts), [next(responses) for _ in record.responses]
            require_prompt(record.found, record.prompt, prompt)
            for text, answer in zip(record.responses, answers, strict=True):
                require_response(record.found, str(text), answer)
            yield record, prompt, [np.append(answer, end) for answer in answers]
