"""What a policy is worth: its responses, their scores, and the loss on held-out text."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
