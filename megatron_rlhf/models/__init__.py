"""Megatron-Core's GPT in the four roles of RLHF: policy, reference, reward and value model."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
