"""A response that is being sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_rlhf.rollout.types import Completion

StopWatch = Callable[[int], bool]
"""Reads a response token by token; True if the response ends with this one."""


@dataclass
class SampledSequence:
    """A prompt and what has been sampled after it so far."""

    index: int
    """Its index among the given prompts."""
    prompt: Sequence[int]
    key: int
    """Key of its random numbers (`sampling.row_keys`)."""
    watch: StopWatch | None = None
    """What else ends it, apart from the stop tokens."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    is_finished: bool = False
    """It has stopped, or has reached the length limit."""

    @property
    def position(self) -> int:
        """Of the token sampled last."""
        return len(self.prompt) + len(self.tokens) - 1

    def append(self, token: int, logprob: float, stop_ids: frozenset[int], minimum: int, limit: int) -> None:
        """Take in the next token, which may end the response: between `minimum` and `limit` tokens."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        text_is_complete = self.watch is not None and self.watch(token)
        self.stopped = token in stop_ids or (text_is_complete and len(self.tokens) >= minimum)
        self.is_finished = self.stopped or len(self.tokens) >= limit

    def completion(self) -> Completion:
        return Completion(self.tokens, self.logprobs, self.stopped)


def sequences_of(
    prompts: Sequence[Sequence[int]], keys: Tensor, stop_watch: Callable[[], StopWatch | None]
) -> list[SampledSequence]:
    """One for each prompt, of which nothing is sampled yet."""
    return [SampledSequence(i, prompts[i], key, stop_watch()) for i, key in enumerate(keys.tolist())]


def in_reading_order(sequences: Sequence[SampledSequence]) -> list[SampledSequence]:
    """Prompts of similar length are read together, so there is little padding, and equal ones are neighbours."""
    return sorted(sequences, key=lambda sequence: (len(sequence.prompt), tuple(sequence.prompt)))


def tokens_done(sequences: Sequence[SampledSequence], limit: int) -> tuple[int, int]:
    """How many tokens are sampled, of those that there may be: the ones of a finished sequence count as all."""
    sampled = sum(limit if each.is_finished else len(each.tokens) for each in sequences)
    return sampled, limit * len(sequences)
