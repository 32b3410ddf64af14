"""Sample responses of a model, score them with a reward model, measure its loss on held-out text.

python examples/evaluate.py run.dir=runs/eval policy.init_from=runs/ppo reward.init_from=runs/rm \
    data.prompts=prompts.jsonl data.tokenizer=tokenizer/
"""

from megatron_rlhf.cli import launch

if __name__ == "__main__":
    launch("evaluate")
