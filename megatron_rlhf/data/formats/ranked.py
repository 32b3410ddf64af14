"""The responses that a record ranks, in any of the forms that comparisons have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlhf.data.chat.messages import (
    ASSISTANT,
    Conversation,
    Messages,
    as_turns,
    holds_messages,
    is_blank,
    read_turns,
)
from megatron_rlhf.data.examples import read_user
from megatron_rlhf.data.formats.dialogues import Dialogue
from megatron_rlhf.data.formats.makers import CYCLE
from megatron_rlhf.data.formats.record import Record


@dataclass(frozen=True)
class RankedRecord:
    """A record before it is tokenised."""

    prompt: str | Conversation
    responses: tuple[str, ...] | tuple[Messages, ...]
    """Of a conversation, messages."""
    ranks: tuple[int, ...]
    user: str | None
    found: Record

    @property
    def has_empty(self) -> bool:
        return any(not r.strip() if isinstance(r, str) else all(map(is_blank, r)) for r in self.responses)

    @property
    def all_equal(self) -> bool:
        return all(response == self.responses[0] for response in self.responses)


def read_ranked(record: Record) -> RankedRecord:
    listed = "responses" in record or not ("chosen" in record or "rejected" in record)
    if "messages" in record or any(holds_messages(record, name) for name in ("prompt", "chosen", "rejected")):
        return _ranked_messages(record) if listed else _pair_of_messages(record)
    if listed:
        return _ranked_list(record)
    if "prompt" in record:
        read = record.text if record.lenient else record.response
        pair = read("chosen"), read("rejected")
        return RankedRecord(record.text("prompt"), pair, (0, 1), read_user(record), record)
    prompt, *answers = Dialogue().split_pair(record)
    return RankedRecord(prompt, tuple(answers), (0, 1), read_user(record), record)


def known_flaw(record: Record) -> str | None:
    """What the files of published formats are known to hold."""
    if record.fields.get("ranks") == CYCLE:
        return CYCLE
    responses = record.fields.get("responses")
    return "too_few_responses" if isinstance(responses, list) and len(responses) < 2 else None


def _ranked_messages(record: Record) -> RankedRecord:
    ranked, ranks = responses_and_ranks(record)
    responses = tuple(as_turns(record, "responses", response, ASSISTANT) for response in ranked)
    return RankedRecord(Conversation(record, _prompt_messages(record)), responses, ranks, read_user(record), record)


def _pair_of_messages(record: Record) -> RankedRecord:
    """The prompt is a column of its own, or the turns that the two conversations begin with."""
    pair = [read_turns(record, name, ASSISTANT) for name in ("chosen", "rejected")]
    if all(answers[0]["role"] == ASSISTANT for answers in pair):
        prompt = _prompt_messages(record)
    else:
        shared = 0
        while shared < min(map(len, pair)) and pair[0][shared] == pair[1][shared]:
            shared += 1
        while shared and all(answers[shared - 1]["role"] == ASSISTANT for answers in pair):
            shared -= 1  # the same answer twice
        if not shared or any(turn[shared:][:1] and turn[shared]["role"] != ASSISTANT for turn in pair):
            raise record.mistake(
                "'chosen' and 'rejected' do not begin with the same messages up to an assistant's turn, so what the answers "
                "answer is unknown; add a column 'prompt'"
            )
        prompt, pair = pair[0][:shared], [answers[shared:] for answers in pair]
    return RankedRecord(Conversation(record, prompt), tuple(pair), (0, 1), read_user(record), record)


def _prompt_messages(record: Record) -> Messages:
    """The prompt of a record with messages: `messages`, or `prompt`, where a text is the user's turn."""
    column = "messages" if "messages" in record and not holds_messages(record, "prompt") else "prompt"
    return Conversation(record, read_turns(record, column, "user")).prompt


def _ranked_list(record: Record) -> RankedRecord:
    responses, ranks = responses_and_ranks(record)
    if any(isinstance(response, Mapping | list) for response in responses):
        return _ranked_messages(record)
    read = record.as_text if record.lenient else record.as_response
    texts = tuple(read("responses", response) for response in responses)
    return RankedRecord(record.text("prompt"), texts, ranks, read_user(record), record)


def responses_and_ranks(record: Record) -> tuple[list[Any], tuple[int, ...]]:
    """The columns `responses` and `ranks`, checked, whatever a response is."""
    responses, ranks = record.value("responses"), record.value("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise record.mistake(f"column 'responses' must be a list of two texts or more, not {responses!r:.60}")
    if not isinstance(ranks, list) or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise record.mistake(f"column 'ranks' must be a list of whole numbers from 0 (the best) up, not {ranks!r:.60}")
    if len(ranks) != len(responses):
        raise record.mistake(
            f"column 'ranks' has {len(ranks)} numbers for {len(responses)} responses; one each is needed"
        )
    return responses, tuple(ranks)
