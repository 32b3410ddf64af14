"""The alignment tax: what the policy has forgotten of its text."""

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.data.pretraining import PretrainingData
from megatron_rlhf.models.microbatches import TokenBatch, language_model_nll
from megatron_rlhf.models.roles import Role


def pretraining_tax(
    policy: Role, reference: Role, pretraining: PretrainingData | None, samples: int, micro_batch: Budget
) -> dict[str, float]:
    """Loss on held-out text of the policy and of the reference, in nats per token; nothing where there is no text."""
    if pretraining is None or pretraining.held_out is None:
        return {}
    data = pretraining.held_out
    count = min(len(data), samples)
    batch = TokenBatch.pack([data[i] for i in range(count)], [1] * count)
    losses = {}
    for name, role in (("tax/pretraining_loss", policy), ("tax/reference_pretraining_loss", reference)):
        nll, tokens = language_model_nll(role, batch, micro_batch)
        losses[name] = nll / tokens
    return losses
