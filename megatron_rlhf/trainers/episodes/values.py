"""The value model's updates, and the first of a rollout that it has not scored, which finds its values."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_rlhf.algorithms.advantages import gae
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rollout.types import Experience, ExperienceTokens, Rollout
from megatron_rlhf.trainers.episodes.microbatches import value_microbatches
from megatron_rlhf.trainers.step import TrainedRole, Update


def update_value(minibatch: Experience, value: TrainedRole, config: PPOConfig) -> Update:
    """One update on the values and returns that the minibatch has."""
    return value.update(value_microbatches(minibatch, value, config), config.value.optimizer.lr)


def value_by_update(
    rollout: Rollout, rewards_bt: Tensor, value: TrainedRole, config: PPOConfig
) -> tuple[Rollout, Update]:
    """The first update on a rollout, of all of it, and the rollout with the values before it, on every rank of the model.

    The update's forward pass has the weights that old values are of, so no other pass needs to find them.
    """
    found = FoundValues(rewards_bt, rollout.mask_bt, config.ppo.gamma, config.ppo.lam)
    unvalued = Experience.of(rollout, found.values_bt, found.values_bt)
    update = value.update(value_microbatches(unvalued, value, config, found.learn), config.value.optimizer.lr)
    return replace(rollout, values_bt=collectives.share_rows(found.values_bt, value.role.layout)), update


@dataclass
class FoundValues:
    """Values that a pass over a rollout finds, and the returns that follow from them and the tokens' rewards."""

    rewards_bt: Tensor
    mask_bt: Tensor
    gamma: float
    lam: float
    values_bt: Tensor = field(init=False)
    """Of this rank's rows, zeros elsewhere."""

    def __post_init__(self) -> None:
        self.values_bt = torch.zeros_like(self.rewards_bt)

    def learn(self, tokens: ExperienceTokens, values_n: Tensor) -> tuple[Tensor, Tensor]:
        """Old values and returns [n] of a microbatch of whole responses, from the values [n] of its pass."""
        row_n, column_n = tokens.place_n
        old_n = torch.where(tokens.mask_n, values_n.detach().to(self.values_bt), 0.0)
        self.values_bt[row_n, column_n] = old_n
        row_r, number_n = row_n.unique(return_inverse=True)
        _, returns_rt = gae(self.rewards_bt[row_r], self.values_bt[row_r], self.mask_bt[row_r], self.gamma, self.lam)
        return old_n, returns_rt[number_n, column_n]
