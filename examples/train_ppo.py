"""PPO-ptx: reinforcement learning from human feedback with pretraining gradients mixed in.

torchrun --nproc-per-node 4 examples/train_ppo.py run.dir=runs/ppo policy.init_from=runs/sft reward.init_from=runs/rm \
    data.prompts=prompts.jsonl data.pretraining.source=text.txt data.tokenizer=tokenizer/ parallel.tensor=2
"""

from megatron_rlhf.cli import launch

if __name__ == "__main__":
    launch("ppo")
