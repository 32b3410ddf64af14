"""A run's reward: a weighted sum of reward models and functions, each of them known by its name."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.rewards import NamedReward
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.packing import Sequences
from megatron_rlhf.rewards.given import GivenFunction, is_given
from megatron_rlhf.rewards.patient import PatientFunction
from megatron_rlhf.rewards.processes import Answers, FunctionFailed, RewardFunction

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What a batch is worth, on every rank."""

    total_b: Tensor
    """The weighted sum."""
    parts: Mapping[str, Tensor]
    """By name, [b], without weight."""
    timeouts: int | None = None
    """Scores that stand for those of functions which did not return in time; None where that ends the run."""

    @property
    def means(self) -> dict[str, float]:
        """Metrics: of the sum, of each of several, and how many were not given in time."""
        return {
            "reward/score_mean": float(self.total_b.mean()),
            **{f"reward/{name}_mean": float(part_b.mean()) for name, part_b in several(self.parts).items()},
            **({} if self.timeouts is None else {"reward/timeouts": float(self.timeouts)}),
        }


def several(parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parts of a score, where it has more than one."""
    return parts if len(parts) > 1 else {}


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

    def read(self, sequences: Sequences, micro_batch_size: Budget | int) -> dict[str, Tensor]:
        """Each model's score, [b]; zeros on ranks outside its layout."""
        return {name: role.scores(sequences, micro_batch_size) for name, role in self.models.items()}

    def scores(self, read: Mapping[str, Tensor]) -> Scores:
        """Of all parts, from what `read` returned; waits for the functions. Collective over the world.

        Raises:
            UserError: on all ranks, where a function did not return scores.
        """
        parts = {name: collectives.publish(score_b.contiguous(), self.layout) for name, score_b in read.items()}
        scored, timeouts = self._functions_scores()
        parts |= scored
        parts = {name: parts[name] for name in self.weights}
        return Scores(torch.stack([w * parts[name] for name, w in self.weights.items()]).sum(0), parts, timeouts)

    def try_functions(self, answers: Callable[[], Answers]) -> None:
        """Score a first batch before anything expensive is built. Raises UserError as `scores` does. Collective."""
        self.ask_functions(answers)
        self._functions_scores()

    def close(self) -> None:
        """End the functions' processes."""
        for function in self.functions.values():
            if function is not None:
                function.close()

    def _functions_scores(self) -> tuple[dict[str, Tensor], int | None]:
        """By name, and `Scores.timeouts`."""
        if not self.functions:
            return {}, None
        here = [function for function in self.functions.values() if function is not None]
        found = [self._attempt(function.scores) for function in here]
        patient = [function for function in here if isinstance(function, PatientFunction)]
        warnings = [each.warning for each in patient if each.warning is not None]
        box: list[Any] = [(self._problem, found, sum(each.timeouts for each in patient) if patient else None, warnings)]
        dist.broadcast_object_list(box, src=self.layout.ranks.start)
        problem, found, timeouts, warnings = box[0]
        for warning in warnings:  # the rank with the log is perhaps another one
            log.warning("%s", warning)
        if problem is not None:
            raise UserError(problem)
        scored = {
            name: torch.tensor(scores, dtype=torch.float32, device=collectives.device())
            for name, scores in zip(self.functions, found, strict=True)
        }
        return scored, timeouts

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Keep what goes wrong on this rank until all ranks can learn of it."""
        if self._problem is None:
            try:
                return work()
            except FunctionFailed as failure:
                self._problem = str(failure)
        return None


def launch_functions(
    layout: ParallelLayout, parts: Sequence[NamedReward]
) -> dict[str, RewardFunction | GivenFunction | None]:
    """Start the processes of these functions, by name, beside the layout's first rank.

    Raises:
        UserError: on all ranks, where one cannot be loaded. Collective over the world.
    """
    launched: dict[str, RewardFunction | GivenFunction | None] = dict.fromkeys(part.name for part in parts)
    problem: list[str | None] = [None]
    if dist.get_rank() == layout.ranks.start:
        try:
            launched = {part.name: _launch(part) for part in parts}
        except FunctionFailed as failure:
            problem = [str(failure)]
    dist.broadcast_object_list(problem, src=layout.ranks.start)
    if problem[0] is not None:
        raise UserError(problem[0])
    return launched


def _launch(part: NamedReward) -> RewardFunction | GivenFunction:
    spec, config = str(part.config.function), part.config
    if is_given(spec):
        return GivenFunction(spec, part.key)
    if config.timeout_score is None:
        return RewardFunction(spec, config.processes, config.timeout_s, part.key)
    return PatientFunction(spec, config.processes, config.timeout_s, part.key, config.timeout_score)
