"""Beam search for one prompt: which continuations stay, and when no better one can come. No models, no tensors.

As `transformers`' `generate(num_beams=n)` with its defaults: a finished response is worth the sum of its tokens'
log-probabilities over their number, and the search ends when none of the beams, at its present length, is worth more than the
worst of n finished ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LOWEST = -1e9
"""The total of a beam that must not go on."""


@dataclass(frozen=True)
class Candidate:
    """A beam with one more token."""

    total: float
    """Sum of the log-probabilities of its tokens, penalties included."""
    parent: int
    """Which of the beams."""
    token: int
    logprob: float
    """Of the token, without penalties."""


@dataclass(frozen=True)
class Beam:
    """The beginning of a response."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0

    def grown(self, candidate: Candidate) -> "Beam":
        return Beam([*self.tokens, candidate.token], [*self.logprobs, candidate.logprob], candidate.total)


@dataclass(frozen=True)
class Finished:
    """A whole response."""

    score: float
    beam: Beam
    stopped: bool
    """It ended by itself, not at the length limit."""


class BeamSearch:
    """The beams of one prompt. At first all are empty, and only the first may grow: else all would grow alike."""

    def __init__(self, beams: int, limit: int, ends: Callable[[list[int]], bool]):
        """`limit`: tokens of the longest response; `ends`: whether a response is whole with its last token."""
        self.beams = [Beam(total=0.0 if i == 0 else LOWEST) for i in range(beams)]
        self.parents = list(range(beams))
        """From which of the former beams each has grown."""
        self.finished: list[Finished] = []
        """The best of them, best first."""
        self.is_over = False
        self._limit, self._ends = limit, ends

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """One token more. `candidates`: the best continuations of all beams together, best first; more than there are beams, so
        that enough of them go on."""
        count = len(self.beams)
        grown = [self.beams[candidate.parent].grown(candidate) for candidate in candidates]
        length = len(grown[0].tokens)
        ended = [self._ends(beam.tokens) for beam in grown]
        at_limit = length >= self._limit
        for beam, is_whole in zip(grown[:count], ended[:count], strict=True):
            if is_whole or at_limit:
                self.finished.append(Finished(beam.total / length, beam, is_whole))
        self.finished = sorted(self.finished, key=lambda each: -each.score)[:count]
        going = [i for i, is_whole in enumerate(ended) if not is_whole][:count]
        self.parents = [candidates[i].parent for i in going]
        self.beams = [grown[i] for i in going]
        if at_limit or not going:
            self.is_over = True
            return
        while len(self.beams) < count:  # texts can end more than stop tokens do
            self.parents.append(self.parents[0])
            self.beams.append(Beam(self.beams[0].tokens, self.beams[0].logprobs, LOWEST))
        full = len(self.finished) == count
        self.is_over = full and self.beams[0].total / length <= self.finished[-1].score
