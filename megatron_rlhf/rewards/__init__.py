"""What gives a response its score: reward models, Python functions, weighted sums of both.

`exact_answer`, `format_rule` and `unit_tests` are functions that are ready to use:
`reward.function=megatron_rlhf.rewards.exact_answer:score`. `sandbox` runs programs of models for them.
"""
