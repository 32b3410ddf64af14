"""PPO-ptx: reinforcement learning from human feedback with pretraining gradients mixed in.

torchrun --nproc-per-node 4 examples/train_ppo.py run.dir=runs/ppo policy.init_from=runs/sft reward.init_from=runs/rm \
    data.prompts=prompts.jsonl data.pretraining.source=text.txt data.tokenizer=tokenizer/ parallel.tensor=2
"""

from megatron_rlhf.cli import launch
from megatron_rlhf.config.checks import check_ppo
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.trainers.setup import build_ppo

if __name__ == "__main__":
    launch("ppo", PPOConfig, check_ppo, build_ppo)
