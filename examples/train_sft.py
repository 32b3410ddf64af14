"""Supervised fine-tuning, and language-model pretraining with data.pretraining_mix=1.

python examples/train_sft.py run.dir=runs/sft policy.init_from=gpt2/ data.tokenizer=gpt2/ data.demonstrations=mine.jsonl
torchrun --nproc-per-node 4 examples/train_sft.py parallel.tensor=2 parallel.pipeline=2 ...
"""

from megatron_rlhf.cli import launch

if __name__ == "__main__":
    launch("sft")
