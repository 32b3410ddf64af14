"""Comparisons for the reward model: a prompt and K responses that a labeler ranked."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rlhf.data.examples import Examples, read_prompt
from megatron_rlhf.data.records import Record, read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens

ASSISTANT_TURN = "\n\nAssistant:"


@dataclass(frozen=True, eq=False)
class Comparison:
    """One prompt with its ranked responses: one element of a reward model batch, however many pairs it makes."""

    prompt_tokens: Tokens
    responses_tokens: tuple[Tokens, ...]
    """Each response and the token that ends it, at which the score of prompt + response is read."""

    ranks: tuple[int, ...]
    """One for each response: 0 is the best, equal ranks are a tie. At least one pair is strict."""


@dataclass(frozen=True)
class _Ranking:
    """A comparison before it is tokenised."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]


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
    or hh-rlhf's {"chosen", "rejected"}, two dialogues that part after a "\\n\\nAssistant:".

    Dropped and counted: sets as `prompt_too_long`; single responses as `response_too_long` or `total_too_long`, and the
    set as `too_few_responses` if no strict pair is left; sets in which all tie as `all_tied`; and dialogues of hh-rlhf
    that end without an answer, as some of the published ones do, as `empty_response`.

    Raises:
        UserError: A mistake in the source, with its line, or nothing left.
    """
    dropped: Counter[str] = Counter()
    rankings: list[_Ranking] = []
    for record in read_records(source, columns):
        ranking = _read_ranking(record, tokenizer)
        if not all(response.strip() for response in ranking.responses):
            dropped["empty_response"] += 1
        elif len(set(ranking.ranks)) == 1:
            dropped["all_tied"] += 1
        else:
            rankings.append(ranking)
    prompts = tokenizer.encode_stream((ranking.prompt for ranking in rankings), bos=True)
    responses = tokenizer.encode_stream(
        (response for ranking in rankings for response in ranking.responses), continuation=True
    )
    items: list[Comparison] = []
    for ranking, prompt in zip(rankings, prompts, strict=True):
        ended = [np.append(next(responses), np.int32(tokenizer.end_id)) for _ in ranking.responses]
        if len(prompt) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
            continue
        kept = []
        for response, rank in zip(ended, ranking.ranks, strict=True):
            if len(response) > max_response_tokens:
                dropped["response_too_long"] += 1
            elif len(prompt) + len(response) > max_length:
                dropped["total_too_long"] += 1
            else:
                kept.append((response, rank))
        if len({rank for _, rank in kept}) < 2:
            dropped["too_few_responses"] += 1
        else:
            items.append(Comparison(prompt, *map(tuple, zip(*kept, strict=True))))
    return Examples(str(source), items, dropped)


def _read_ranking(record: Record, tokenizer: Tokenizer) -> _Ranking:
    if "responses" in record or not ("chosen" in record or "rejected" in record):
        return _ranked_list(record, tokenizer)
    if "prompt" in record:
        pair = record.response("chosen"), record.response("rejected")
        return _Ranking(read_prompt(record, tokenizer), pair, (0, 1))
    return _dialogue_pair(record)


def _ranked_list(record: Record, tokenizer: Tokenizer) -> _Ranking:
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
    return _Ranking(read_prompt(record, tokenizer), texts, tuple(ranks))


def _dialogue_pair(record: Record) -> _Ranking:
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
    return _Ranking(chosen[:end], (chosen[end:], rejected[end:]), (0, 1))
