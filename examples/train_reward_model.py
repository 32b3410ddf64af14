"""A reward model from K-wise human rankings.

python examples/train_reward_model.py run.dir=runs/rm reward.init_from=runs/sft data.comparisons=ranked.jsonl \
    data.tokenizer=tokenizer/
"""

from megatron_rlhf.cli import launch
from megatron_rlhf.config.checks import check_reward_model
from megatron_rlhf.config.stages import RewardModelConfig
from megatron_rlhf.trainers.setup import build_reward_model

if __name__ == "__main__":
    launch("reward_model", RewardModelConfig, check_reward_model, build_reward_model)
