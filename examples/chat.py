"""Talk with a model in the terminal, through its chat template, with the reward model's score beside each answer.

python examples/chat.py policy.init_from=runs/ppo reward.init_from=runs/rm other.init_from=runs/sft
"""

from megatron_rlhf.cli import launch_chat

if __name__ == "__main__":
    launch_chat()
