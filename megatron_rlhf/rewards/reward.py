"""A run's reward: a weighted sum of reward models and functions, each of them known by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.packing import Sequences
from megatron_rlhf.rewards.given import GivenFunction, is_given
from megatron_rlhf.rewards.processes import Answers, FunctionFailed, RewardFunction

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """What a batch is worth, on every rank."""

    total_b: Tensor
    """The weighted sum."""
    parts: Mapping[str, Tensor]
    """By name, [b], without weight."""


@dataclass
class Reward:
    """Models are on the critic's ranks; functions run beside the first of these ranks, while the models read.

    One rank alone asks the functions, so that all ranks have the same scores even where a function depends on chance.
    """

    layout: ParallelLayout
    weights: Mapping[str, float]
    models: Mapping[str, Role] = field(default_factory=dict)
    functions: Mapping[str, RewardFunction | GivenFunction | None] = field(default_factory=dict)
    """None on all ranks but the first."""
    _problem: str | None = None
    """What went wrong with a function on this rank."""

    def ask_functions(self, answers: Callable[[], Answers]) -> None:
        """Hand a batch to the functions; `answers` is called only where there are some."""
        self._problem = None
        here = [function for function in self.functions.values() if function is not None]
        if here:
            asked = answers()
            for function in here:
                self._attempt(partial(function.start, asked))

    def read(self, sequences: Sequences, last_b: Tensor, micro_batch_size: Budget | int) -> dict[str, Tensor]:
        """Each model's score at the last token, [b]; zeros on ranks outside its layout."""
        return {
            name: role.values(sequences, micro_batch_size).gather(1, last_b.unsqueeze(-1)).squeeze(-1)
            for name, role in self.models.items()
        }

    def scores(self, read: Mapping[str, Tensor]) -> Scores:
        """Of all parts, from what `read` returned; waits for the functions. Collective over the world.

        Raises:
            UserError: on all ranks, where a function did not return scores.
        """
        parts = {name: collectives.publish(score_b.contiguous(), self.layout) for name, score_b in read.items()}
        parts |= self._functions_scores()
        parts = {name: parts[name] for name in self.weights}
        return Scores(torch.stack([w * parts[name] for name, w in self.weights.items()]).sum(0), parts)

    def try_functions(self, answers: Callable[[], Answers]) -> None:
        """Score a first batch before anything expensive is built. Raises UserError as `scores` does. Collective."""
        self.ask_functions(answers)
        self._functions_scores()

    def close(self) -> None:
        """End the functions' processes."""
        for function in self.functions.values():
            if function is not None:
                function.close()

    def _functions_scores(self) -> dict[str, Tensor]:
        if not self.functions:
            return {}
        here = [function for function in self.functions.values() if function is not None]
        found = [self._attempt(function.scores) for function in here]
        box: list[Any] = [(self._problem, found)]
        dist.broadcast_object_list(box, src=self.layout.ranks.start)
        problem, found = box[0]
        if problem is not None:
            raise UserError(problem)
        return {
            name: torch.tensor(scores, dtype=torch.float32, device=collectives.device())
            for name, scores in zip(self.functions, found, strict=True)
        }

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Keep what goes wrong on this rank until all ranks can learn of it."""
        if self._problem is None:
            try:
                return work()
            except FunctionFailed as failure:
                self._problem = str(failure)
        return None


def launch_functions(
    layout: ParallelLayout, functions: Mapping[str, tuple[str, int, float, str]]
) -> dict[str, RewardFunction | GivenFunction | None]:
    """Start the processes of functions, (spec, processes, time limit, key) by name, beside the layout's first rank.

    Raises:
        UserError: on all ranks, where one cannot be loaded. Collective over the world.
    """
    launched: dict[str, RewardFunction | GivenFunction | None] = dict.fromkeys(functions)
    problem: list[str | None] = [None]
    if dist.get_rank() == layout.ranks.start:
        try:
            launched = {name: _launch(*arguments) for name, arguments in functions.items()}
        except FunctionFailed as failure:
            problem = [str(failure)]
    dist.broadcast_object_list(problem, src=layout.ranks.start)
    if problem[0] is not None:
        raise UserError(problem[0])
    return launched


def _launch(spec: str, processes: int, timeout_s: float, key: str) -> RewardFunction | GivenFunction:
    return GivenFunction(spec, key) if is_given(spec) else RewardFunction(spec, processes, timeout_s, key)
