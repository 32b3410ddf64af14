"""Checkpoints of ours, which any layout can load, and Hugging Face folders, read and written."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
