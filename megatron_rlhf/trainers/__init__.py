"""The stages: supervised fine-tuning, reward model, PPO-ptx, and the update step that they share."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
