"""A tokenizer's chat template: conversations to token ids, exactly those of `apply_chat_template`, and what is learned of them.

A template renders a whole conversation, so where an answer begins and ends in it has to be found out: it begins where the
rendering goes on from the prompt of the turns before it (which ends as the template prompts for an answer), and ends with the
token that ends a response. A token that holds both the end of the prompt and the beginning of an answer belongs to the answer.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rlhf.data.chat.messages import Conversation, Message, Messages
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens

log = logging.getLogger(__name__)

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "xyzzy"


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as tokens [t], and which of them are learned."""

    tokens: Tokens
    targets: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answer:
    """An answer at the end of a rendered text: tokens[start:end]. Behind its end there may be scaffolding."""

    tokens: Sequence[int]
    start: int
    end: int


class Chat:
    """Conversations through the chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._hf = tokenizer.hf
        self._checked: set[tuple[str, ...]] = set()
        self._warned: set[str] = set()

    def prompt_text(self, conversation: Conversation) -> str:
        """The turns before the assistant's, and the template's beginning of an answer."""
        if not conversation.prompt:
            raise conversation.record.mistake("there are no messages before the assistant's, so nothing to answer")
        self._require_all_turns(conversation, conversation.prompt)
        return self._render(conversation, conversation.prompt, prompts=True)

    def learned(self, conversation: Conversation, last_only: bool = False) -> list[Rendered]:
        """The conversation as one example or, where the template renders earlier turns in another way than when they are
        answered, as several: each answer that changes later is learned as the last turn of an example of its own.

        Args:
            last_only: learn the last of the assistant's turns alone, not all.
        """
        record, messages, answers = conversation.record, conversation.messages, conversation.answers
        if not answers:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages[conversation.learned_from :]))
            raise record.mistake(f"no turn of the role 'assistant' to learn; the roles are: {roles}")
        if last_only:
            answers, messages = answers[-1:], messages[: answers[-1] + 1]
        self._require_all_turns(conversation, messages)
        if self._marks_answers(conversation):
            return [self._marked(conversation, messages, answers[0] if last_only or conversation.learned_from else 0)]
        found = [self._answer(conversation, messages[:i], messages[i : i + 1]) for i in answers]
        whole = self._tokenizer.encode(self._render(conversation, messages))
        examples = []
        for tokens in (whole, *(answer.tokens for answer in reversed(found))):
            inside = [a for a in found if list(tokens[: a.end]) == list(a.tokens[: a.end])]
            if inside:
                targets = np.zeros(len(tokens), dtype=bool)
                for answer in inside:
                    targets[answer.start : answer.end] = True
                examples.append(Rendered(np.array(tokens, dtype=np.int32), targets))
                found = [a for a in found if a not in inside]
        return examples[::-1]

    def answers(self, conversation: Conversation, completions: Sequence[Messages]) -> tuple[Tokens, list[Tokens]]:
        """Tokens of the prompt, and of several completions of it, each up to its end."""
        found = []
        for completion in completions:
            self._require_all_turns(conversation, (*conversation.messages, *completion))
            found.append(self._answer(conversation, conversation.messages, completion))
        start = min(min(answer.start, _common(found[0].tokens, answer.tokens)) for answer in found)
        responses = [np.array(answer.tokens[start : answer.end], dtype=np.int32) for answer in found]
        return np.array(found[0].tokens[:start], dtype=np.int32), responses

    def _answer(self, conversation: Conversation, before: Messages, completion: Messages) -> Answer:
        """Where the completion of these messages lies in the rendering of both."""
        record = conversation.record
        if not before:
            raise record.mistake("the conversation begins with the assistant's turn: there is nothing to answer")
        prompt = self._render(conversation, before, prompts=True)
        text = self._render(conversation, (*before, *completion))
        tokens, last_characters = self._tokenizer.encode_with_ends(text)
        if text.startswith(prompt):
            start = next((i for i, last in enumerate(last_characters) if last > len(prompt)), len(tokens))
        else:
            self._require_same_history(conversation, before, prompt, text)
            start = _common(tokens, self._tokenizer.encode(prompt))
        ends = [place for place, token in enumerate(tokens) if token == self._tokenizer.end_id and place >= start]
        if not ends:
            end = self._hf.convert_ids_to_tokens(self._tokenizer.end_id)
            raise record.mistake(
                f"the chat template does not end the assistant's turn with the token that ends a response, {end}: "
                f"{text[-60:]!r}; a model that learns from it would never stop. Give a template that does: data.chat_template"
            )
        return Answer(tokens, start, ends[-1] + 1)

    def _require_same_history(self, conversation: Conversation, before: Messages, prompt: str, text: str) -> None:
        history = self._render(conversation, before)
        history = history[: _common(prompt, history)]
        if not text.startswith(history):
            raise conversation.record.mistake(
                f"the chat template changes what is before the assistant's turn when it is added: {history[-40:]!r} becomes "
                f"{text[_common(history, text) :][:40]!r}, so what the turn answers is unknown; give a "
                "template that does not, or that marks the assistant's text by {% generation %}: data.chat_template"
            )
        shown = prompt[len(history) :]
        self._warn(
            f"the chat template prompts for an answer with {shown!r} but renders answers such as that of "
            f"{conversation.record.where} in another way: what is learned begins where the two differ, and a response that is "
            "sampled begins otherwise"
        )

    def _marked(self, conversation: Conversation, messages: Messages, first: int) -> Rendered:
        """Where the template marks what the assistant says, the mask is `transformers`' own, from message `first` on."""
        with _naming(conversation.record):
            found: Any = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template(conversation),
                return_dict=True,
                return_assistant_tokens_mask=True,
                **conversation.variables(),
            )
        tokens = np.array(found["input_ids"], dtype=np.int32)
        targets = np.array(found["assistant_masks"], dtype=bool)
        if first:
            given = self._tokenizer.encode(self._render(conversation, messages[:first], prompts=True))
            targets[: _common(tokens, given)] = False
        if not targets.any():
            raise conversation.record.mistake("the chat template marks nothing of it as the assistant's")
        return Rendered(tokens, targets)

    def _marks_answers(self, conversation: Conversation) -> bool:
        return bool(_GENERATION_MARK.search(self._template(conversation)))

    def _template(self, conversation: Conversation) -> str:
        template = self._hf.get_chat_template(tools=conversation.variables().get("tools"))
        day = self._tokenizer.today
        if day is None:
            return template
        # A run that goes on tomorrow must read the same conversations.
        return _DATE.sub(lambda call: repr(day.strftime(call.group(2))), template)

    def _render(self, conversation: Conversation, messages: Sequence[Message], prompts: bool = False) -> str:
        if self._hf.chat_template is None:
            raise conversation.record.mistake(
                f"holds messages, and the tokenizer {self._hf.name_or_path} has no chat template to make text of them; give "
                "one: data.chat_template=FILE.jinja (prepare: --chat-template)"
            )
        with _naming(conversation.record):
            return str(
                self._hf.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._template(conversation),
                    tokenize=False,
                    add_generation_prompt=prompts,
                    **conversation.variables(),
                )
            )

    def _require_all_turns(self, conversation: Conversation, messages: Messages) -> None:
        """Every turn's content changes the text; what a template leaves out would be lost silently.

        Templates decide by roles, so each order of roles is tried once; content that does not occur as it is, each time.
        """
        text = self._render(conversation, messages)
        position, all_there = 0, True
        for message in messages:
            content = str(message.get("content") or "").strip()
            found = text.find(content, position)
            all_there, position = all_there and found >= 0, max(position, found + len(content))
        roles = tuple(message["role"] for message in messages)
        if all_there and roles in self._checked:
            return
        for turn, message in enumerate(messages):
            if not str(message.get("content") or "").strip():
                continue
            other = {**message, "content": f"{message['content']}{_PROBE}"}
            if self._render(conversation, (*messages[:turn], other, *messages[turn + 1 :])) == text:
                raise conversation.record.mistake(
                    f"the chat template leaves out turn {turn + 1}, {message['role']!r}: {message['content']!r:.60}; give "
                    "another template (data.chat_template), or data that it takes"
                )
        self._checked.add(roles)

    def _warn(self, message: str) -> None:
        kind = message[:60]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)


@contextlib.contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Whatever a template raises, which is a program, becomes a mistake of the record."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise record.mistake(
            f"the chat template refuses this conversation: {reason}; give another template (data.chat_template), or data "
            "that it takes"
        ) from error


def _common(a: Sequence[Any] | Tokens, b: Sequence[Any] | Tokens) -> int:
    """How many first tokens, or characters, are the same."""
    differing = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
