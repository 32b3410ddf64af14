"""What reward and value models make of responses: of all at once, or of those that have ended while others are sampled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rewards.processes import Answers
from megatron_rlhf.rewards.reward import Reward
from megatron_rlhf.rollout.delivery import Portion
from megatron_rlhf.rollout.types import Completion, Responses

Timer = Callable[[str], AbstractContextManager]


@dataclass
class Judge:
    """Reward and value models on their ranks; on others it reads nothing, and holds zeros."""

    reward: Reward
    value: Role | None
    prompts: Sequence[Sequence[int]]
    pad_id: int
    budget: Budget
    answers: Callable[[Responses], Answers]
    """The responses as reward functions read them."""
    read_n: list[tuple[list[int], dict[str, Tensor], Tensor]] = field(default_factory=list)
    """Rows, their scores by reward model [n], and their values [n, s], empty without a value model."""

    def pack(self, portion: Portion) -> Responses:
        prompts = [list(self.prompts[row]) for row in portion]
        return Responses.pack(prompts, list(portion.values()), self.pad_id, collectives.device())

    def read(self, portion: Portion, responses: Responses) -> None:
        """`responses`: the portion, packed."""
        scores = self.reward.read(responses.sequences, self.budget)
        values = torch.zeros(0)
        if self.value is not None:
            values = self.value.values(responses.sequences, self.budget)
        self.read_n.append((list(portion), scores, values))

    def all_at_once(self, completions: Sequence[Completion]) -> Responses:
        """Read the whole batch, which is returned."""
        whole = dict(enumerate(completions))
        responses = self._ask(whole)
        self.read(whole, responses)
        return responses

    def as_they_come(self, portions: Iterator[Portion], timer: Timer) -> tuple[list[Completion], Responses]:
        """Read portion after portion, each as it arrives. Functions, which score whole batches, are asked after the last."""
        whole: dict[int, Completion] = {}
        while len(whole) < len(self.prompts):
            with timer("waiting"):
                portion = next(portions)
            with timer("scoring"):
                whole |= portion
                if len(whole) == len(self.prompts):
                    whole = dict(sorted(whole.items()))
                    responses = self._ask(whole)
                self.read(portion, self.pack(portion))
        return list(whole.values()), responses

    def _ask(self, whole: Portion) -> Responses:
        responses = self.pack(whole)
        self.reward.ask_functions(lambda: self.answers(responses))
        return responses

    def scores(self) -> dict[str, Tensor]:
        """By reward model, [b], as `Reward.scores` takes them."""
        return {
            name: self._whole([scores[name].unsqueeze(-1) for _, scores, _ in self.read_n], 1).squeeze(-1)
            for name in self.reward.models
        }

    def values(self, width: int) -> Tensor:
        """[b, width]; zeros where there is no value model."""
        if self.value is None:
            return torch.zeros(len(self.prompts), width, device=collectives.device())
        return self._whole([values for *_, values in self.read_n], width)

    def portions(self) -> Tensor:
        """[b]: in which portion each row was read."""
        return self._whole([torch.full((len(rows), 1), i) for i, (rows, *_) in enumerate(self.read_n)], 1).squeeze(-1)

    def _whole(self, parts: Sequence[Tensor], width: int) -> Tensor:
        whole = torch.zeros(len(self.prompts), width, device=collectives.device())
        for (rows, *_), part in zip(self.read_n, parts, strict=True):
            whole[rows, : part.shape[1]] = part.to(whole)
        return whole
