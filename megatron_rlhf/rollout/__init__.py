"""The policy answers prompts; the other roles judge the answers."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
