"""What gives a response its score: reward models, Python functions, weighted sums of both.

`exact_answer` and `format_rule` are functions that are ready to use: `reward.function=megatron_rlhf.rewards.exact_answer:score`.
"""
