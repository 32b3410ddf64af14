"""What a library's user adds to a run, without a copy of its code (docs/library.md)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Callback:
    """All methods are called on every rank, and may use collectives. Change what a trainer does in `begin`."""

    def begin(self, trainer: Any) -> None:
        """The models are built, and restored where the run is resumed; no step has been made."""

    def step(self, trainer: Any, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """After a step, before its metrics are logged: returns more of them, the same names on every rank, or None."""

    def end(self, trainer: Any) -> None:
        """After the last step and its checkpoint."""


class _Step(Callback):
    def __init__(self, function: Callable[[Any, Mapping[str, float]], Mapping[str, float] | None]) -> None:
        self._function = function

    def step(self, trainer: Any, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        return self._function(trainer, metrics)


def as_callbacks(given: Iterable[Any]) -> list[Callback]:
    """A plain function is what is called at every step."""
    return [one if isinstance(one, Callback) else _Step(one) for one in given]
