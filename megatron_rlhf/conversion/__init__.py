"""Reading and writing Hugging Face's and NeMo's checkpoints, and checking the result against the original."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
