"""Which gaps between sampled and trained log-probabilities end a run."""

import pytest

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.trainers.episodes.on_policy import RolloutMismatch, require_on_policy

SAMPLED, FIRST = "rollout/logprob_gap_max", "policy/first_ratio_max_gap"
DROPOUT = ["policy.lora.rank=2", "policy.lora.dropout=0.1"]


@pytest.mark.parametrize(
    ("gaps", "given", "refused"),
    [
        ({SAMPLED: 0.01, FIRST: 0.01}, [], False),
        ({SAMPLED: 0.06}, [], True),
        ({FIRST: 0.06}, [], True),
        ({FIRST: 0.06}, ["precision=bf16"], False),
        ({FIRST: 0.06}, ["precision=bf16", "ppo.max_logprob_gap=0.05"], True),
        ({SAMPLED: 1e-6, FIRST: 5.0}, DROPOUT, False),
        ({SAMPLED: 0.06, FIRST: 5.0}, DROPOUT, True),
    ],
)
def test_gaps_beyond_rounding_end_a_run(gaps, given, refused):
    config, _ = compose_config("ppo", PPOConfig, given, missing="-")
    if not refused:
        require_on_policy(gaps, 3, config)
        return
    with pytest.raises(RolloutMismatch, match=r"differ by 0\.06 at iteration 3, more than ppo\.max_logprob_gap=0\.05"):
        require_on_policy(gaps, 3, config)
