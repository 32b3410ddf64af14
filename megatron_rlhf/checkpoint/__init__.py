"""Distributed checkpoints, which can be loaded at any layout."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
