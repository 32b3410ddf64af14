"""Layouts, process groups and pipeline schedules. Importing it lets `megatron.core` run without CUDA."""

from megatron_rlhf.parallel import accelerators, adam, cpu

if not cpu.install():
    accelerators.import_megatron_quietly()
adam.use_where_torch_would_serve()
