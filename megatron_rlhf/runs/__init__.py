"""What keeps a run alive: its folder and lock, checkpoints in time, watchdog, signals, guards."""

import megatron_rlhf.parallel  # noqa: F401  (before the first import of megatron.core, which it lets run without CUDA)
