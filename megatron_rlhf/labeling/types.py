"""What a labeling project is made of."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rlhf.data.chat.messages import readable

RANKINGS, DEMONSTRATIONS = "rankings", "demonstrations"
TRAINING, HELD_OUT = "training", "held_out"


@dataclass(frozen=True)
class Task:
    """A prompt with the outputs to rank; none if a demonstration is to be written."""

    prompt: str
    outputs: tuple[str, ...] = ()
    sources: tuple[str | None, ...] = ()
    """Who wrote each output; never shown to a labeler."""
    user: str | None = None
    """Who wrote the prompt."""
    given: Mapping[str, Any] | None = None
    """The columns from which training reads the prompt, where it is messages: `prompt` is then for people to read."""

    @classmethod
    def of(
        cls, given: Mapping[str, Any], outputs: Sequence[str], sources: Sequence[str | None], user: str | None = None
    ) -> "Task":
        """Of a prompt as training reads it: a text, or messages and what a chat template gets besides."""
        prompt = given["prompt"]
        if isinstance(prompt, str):
            return cls(prompt, tuple(outputs), tuple(sources), user)
        return cls(readable(prompt), tuple(outputs), tuple(sources), user, given)

    @property
    def key(self) -> tuple[str, str | None]:
        """Equal for equal prompts: its text, and `given` as JSON."""
        return self.prompt, None if self.given is None else json.dumps(self.given, sort_keys=True)

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for equal prompts with the same outputs of the same sources."""
        return *self.key, self.outputs, self.sources or (None,) * len(self.outputs)


@dataclass(frozen=True)
class Settings:
    """What is chosen once, when a project is made."""

    kind: str = RANKINGS
    title: str = "Labels"
    instructions: str = ""
    labels_per_prompt: int = 1
    """How many labelers of each team get each prompt."""
    require_ratings: bool = False
    """A ranking cannot be submitted before each output has its 1-7 rating."""
    secret: str = field(default_factory=lambda: secrets.token_hex(32))
    """Signs the cookies of a page without a token; decides in which order a labeler sees outputs."""


@dataclass(frozen=True)
class Answer:
    """A labeler's answer to a task, as it stands."""

    number: int
    task: Task
    labeler: str
    team: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """What a labeler has done."""

    labeler: str
    team: str
    done: int
    skipped: int


class Refused(Exception):
    """A click that the project's state does not allow, such as a second answer to the same prompt."""
