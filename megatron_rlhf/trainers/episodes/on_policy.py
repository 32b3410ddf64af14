"""What is sampled is what is trained: the two passes over a response may differ by rounding alone."""

from collections.abc import Mapping

from megatron_rlhf.config.errors import RunFailed
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.stages import PPOConfig

# Largest difference over all tokens of a rollout that rounding explains, in nats. In fp32 it is below 1e-4. 8 bits of
# mantissa leave logits of 20 or 30 wrong by 0.1, and a rollout of a million tokens has unlikely ones where several such
# errors add up; but a shifted position or a wrong temperature is off by several nats. fp8 has 3 or 4 bits.
LOGPROB_GAPS = {Precision.fp32: 0.05, Precision.bf16: 2.0, Precision.fp16: 1.0, Precision.fp8_hybrid: 4.0}


class RolloutMismatch(RunFailed):
    """Sampled and recomputed log-probabilities differ by more than rounding: a bug, not a matter of tuning."""


def require_on_policy(metrics: Mapping[str, float], step: int, config: PPOConfig) -> None:
    """Raise RolloutMismatch where an iteration's gaps are above `ppo.max_logprob_gap`, or above what the precision explains.

    With dropout, which sampling does not have, the first update's ratios say nothing about that.
    """
    names = ["rollout/logprob_gap_max", *([] if config.policy.lora.dropout else ["policy/first_ratio_max_gap"])]
    gap, precision, limit = max(metrics.get(name, 0.0) for name in names), config.precision, config.ppo.max_logprob_gap
    if limit is None:
        limit = LOGPROB_GAPS[precision]
    if gap > limit:
        raise RolloutMismatch(
            f"sampled and trained log-probabilities differ by {gap:.3g} at iteration {step}, more than "
            f"ppo.max_logprob_gap={limit:g}: with precision={precision.value} that is a bug in sampling or masking, "
            "not rounding"
        )
