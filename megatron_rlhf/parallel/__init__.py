"""Layouts, process groups and pipeline schedules. Importing it lets `megatron.core` run where there is no CUDA."""

from megatron_rlhf.parallel import accelerators, cpu

if not cpu.install():
    accelerators.import_megatron_quietly()

from megatron_rlhf.parallel import compat  # it imports megatron.core

compat.warn_once()
