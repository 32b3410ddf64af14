"""Other people's checkpoints, Hugging Face's and NeMo's, read, written and checked against the original."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
