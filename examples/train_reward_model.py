"""A reward model from K-wise human rankings.

python examples/train_reward_model.py run.dir=runs/rm reward.init_from=runs/sft data.comparisons=ranked.jsonl \
    data.tokenizer=tokenizer/
"""

from megatron_rlhf.cli import launch

if __name__ == "__main__":
    launch("reward_model")
