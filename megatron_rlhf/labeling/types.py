"""What a labeling project is made of."""

import secrets
from dataclasses import dataclass, field
from typing import Any

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
