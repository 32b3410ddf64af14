"""PPO's two losses as microbatches of a minibatch, normalised by its response tokens over all ranks.

Legend: b = episodes, s = sequence, t = response positions, v = vocabulary (this tensor-parallel rank's part).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rlhf.algorithms.losses import policy_loss, value_loss
from megatron_rlhf.algorithms.masking import masked_sum
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.models.microbatches import local_rows, pad_to_layout
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.rollout.types import Experience
from megatron_rlhf.trainers.step import TrainedRole


def policy_microbatches(minibatch: Experience, policy: TrainedRole, config: PPOConfig) -> list[Microbatch]:
    """The clipped policy loss of a minibatch; the entropy comes along as a statistic."""
    role, temperature = policy.role, config.rollout.temperature
    tokens_in_minibatch = minibatch.mask_bt.sum()

    def microbatch(part: Experience) -> Microbatch:
        targets_bt = part.tokens_bs.gather(1, part.positions_bt + 1)

        def loss_of(logits_bsv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            rows = torch.arange(len(part), device=logits_bsv.device).unsqueeze(-1)
            logits_btv = role.respond(logits_bsv[rows, part.positions_bt])  # prompts and padding need no softmax
            logprobs_bt = token_logprobs(logits_btv, targets_bt, role.layout.groups.tp, temperature)
            loss, statistics = policy_loss(
                logprobs_bt, part.logprobs_bt, part.advantages_bt, part.mask_bt, config.ppo.clip, tokens_in_minibatch
            )
            with torch.no_grad():
                entropy_bt = role.entropy(logits_btv.detach() / temperature)
                statistics["entropy"] = masked_sum(entropy_bt, part.mask_bt) / tokens_in_minibatch
            return loss, _named("policy", loss, statistics)

        return Microbatch(pad_to_layout(part.tokens_bs, role), loss_of)

    return _experience_microbatches(minibatch, policy, config, microbatch)


def value_microbatches(minibatch: Experience, value: TrainedRole, config: PPOConfig) -> list[Microbatch]:
    """The clipped value loss of a minibatch."""
    tokens_in_minibatch = minibatch.mask_bt.sum()

    def microbatch(part: Experience) -> Microbatch:
        def loss_of(values_bs1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values_bt = values_bs1.squeeze(-1).gather(1, part.positions_bt)
            loss, statistics = value_loss(
                values_bt, part.values_bt, part.returns_bt, part.mask_bt, config.ppo.value_clip, tokens_in_minibatch
            )
            return loss, _named("value", loss, statistics)

        return Microbatch(pad_to_layout(part.tokens_bs, value.role), loss_of)

    return _experience_microbatches(minibatch, value, config, microbatch)


def _experience_microbatches(
    minibatch: Experience, trained: TrainedRole, config: PPOConfig, build: Callable[[Experience], Microbatch]
) -> list[Microbatch]:
    result = []
    for rows, counts in local_rows(len(minibatch), trained.role, config.ppo.micro_batch_size):
        part = minibatch.rows(rows).trimmed()
        result.append(build(part if counts else part.uncounted()))
    return result


def _named(prefix: str, loss: Tensor, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/loss": loss.detach(), **{f"{prefix}/{name}": value for name, value in statistics.items()}}
