"""PPO's two losses as microbatches of a minibatch, normalised by its response tokens over all ranks.

Legend: n = response tokens of a microbatch, v = vocabulary (this tensor-parallel rank's part).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from megatron_rlhf.algorithms.losses import policy_loss, value_loss
from megatron_rlhf.algorithms.masking import masked_sum
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.models.microbatches import local_rows
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.rollout.types import Experience, ExperienceTokens
from megatron_rlhf.trainers.step import TrainedRole


def policy_microbatches(minibatch: Experience, policy: TrainedRole, config: PPOConfig) -> list[Microbatch]:
    """The clipped policy loss of a minibatch, less `entropy_coef` times the mean entropy, which is a statistic too."""
    role, temperature, bonus = policy.role, config.rollout.temperature, config.ppo.entropy_coef
    tokens_in_minibatch = minibatch.num_tokens

    def loss_of(tokens: ExperienceTokens, logits_nv: Logits) -> tuple[Tensor, dict[str, Tensor]]:
        asked = logits_nv.without(role.unknown_v)
        logprobs_n, entropy_n = asked.logprobs_and_entropy(tokens.targets_n, temperature, differentiable=bonus != 0)
        loss, statistics = policy_loss(
            logprobs_n, tokens.logprobs_n, tokens.advantages_n, tokens.mask_n, config.ppo.clip, tokens_in_minibatch
        )
        mean_entropy = masked_sum(entropy_n, tokens.mask_n) / tokens_in_minibatch
        statistics["entropy"] = mean_entropy.detach()
        return loss - bonus * mean_entropy if bonus else loss, _named("policy", loss, statistics)

    return _experience_microbatches(minibatch, role, config, loss_of)


def value_microbatches(
    minibatch: Experience,
    value: TrainedRole,
    config: PPOConfig,
    learn: Callable[[ExperienceTokens, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> list[Microbatch]:
    """The clipped value loss of a minibatch. `learn`: old values and returns [n] of tokens, from the values [n] of this pass,
    where the minibatch does not have them."""
    tokens_in_minibatch = minibatch.num_tokens

    def loss_of(tokens: ExperienceTokens, values_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values_n = values_n1.squeeze(-1)
        old_n, returns_n = (tokens.values_n, tokens.returns_n) if learn is None else learn(tokens, values_n)
        loss, statistics = value_loss(
            values_n, old_n, returns_n, tokens.mask_n, config.ppo.value_clip, tokens_in_minibatch
        )
        return loss, _named("value", loss, statistics)

    return _experience_microbatches(minibatch, value.role, config, loss_of)


def _experience_microbatches(
    minibatch: Experience,
    role: Role,
    config: PPOConfig,
    loss_of: Callable[[ExperienceTokens, Any], tuple[Tensor, dict[str, Tensor]]],
) -> list[Microbatch]:
    size, sequences = config.ppo.micro_batch, minibatch.sequences
    result = []
    for rows, counts in local_rows(sequences, role, size):
        tokens = minibatch.response_tokens(rows, counts)
        arranged = role.arrange(sequences, rows, size)
        result.append(Microbatch.of(arranged, sequences.wanted(rows), partial(loss_of, tokens)))
    return result


def _named(prefix: str, loss: Tensor, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/loss": loss.detach(), **{f"{prefix}/{name}": value for name, value in statistics.items()}}
