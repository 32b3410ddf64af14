"""Reward functions that a program hands over itself (`megatron_rlhf.run(..., reward=function)`): they run in this process."""

from typing import Any

from megatron_rlhf.rewards.functions import Function, Mistake, numbers_of
from megatron_rlhf.rewards.processes import Answers, FunctionFailed

PREFIX = f"{__name__}:"
_given: dict[str, Function] = {}


def give(function: Function) -> str:
    """Keep a function; returns the text that stands for it in a configuration."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    spec = f"{PREFIX}{name.rpartition('.')[2].strip('<>')}"
    _given[spec] = function
    return spec


def is_given(spec: str) -> bool:
    return spec.startswith(PREFIX)


class GivenFunction:
    """As `processes.RewardFunction`, but in this process and without a time limit."""

    def __init__(self, spec: str, key: str) -> None:
        self.name = f"{key}.function={spec}"
        self._spec = spec
        self._answers = Answers([], [], [], [])
        if spec not in _given:
            raise FunctionFailed(
                f"{self.name} was handed over by a program with run(..., reward=function): do so again"
            )

    def start(self, answers: Answers) -> None:
        """Keep a batch."""
        self._answers = answers

    def scores(self) -> list[float]:
        """One for each response of the batch, in its order.

        Raises:
            FunctionFailed: the function raised, or returned something else.
        """
        answers = self._answers
        names = [f"the response to prompt {number}" for number in answers.ids]
        try:
            returned: Any = _given[self._spec](list(answers.prompts), list(answers.responses), list(answers.records))
            return numbers_of(returned, names)
        except Mistake as mistake:
            raise FunctionFailed(f"{self.name} {mistake}") from mistake
        except Exception as error:
            raise FunctionFailed(f"{self.name} raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """There is nothing to end."""
