"""What a configuration needs from the machine: its ranks, and what is installed."""

import math
import os

import torch

from megatron_rlhf.config.checking import checks, layout_checks
from megatron_rlhf.config.checking import engine as engine_checks
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.rollout import SamplingEngine
from megatron_rlhf.config.stages import BaseConfig, ChatConfig, EvaluateConfig, PPOConfig
from megatron_rlhf.conversion.architecture import is_layer, tensor_shapes
from megatron_rlhf.parallel.accelerators import dynamic_engine_lacks, transformer_engine_serves
from megatron_rlhf.runs.peak import cluster_of


def check_machine(config: BaseConfig, world_size: int) -> None:
    """Check layouts against the world size, precision against what is installed. No process group is needed."""
    layouts = _layouts(config, world_size)
    if any(parallel.sequence for parallel, _ in layouts.values()):
        # One queue to the GPU: its kernels start in the order of the calls, so communication starts before the products
        # that hide it. Read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cluster_of(config.run.cluster)
    config.run.profiled_steps()
    engine = transformer_engine_serves()
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else (0, 0)
    checks.check_precision(config.precision, config.fp8.recipe, engine, gpu, capability)
    checks.check_fp8(config)
    if isinstance(config, PPOConfig):
        chosen = config.rollout.engine is SamplingEngine.megatron
        engine_checks.check_engine(config, dynamic_engine_lacks() if chosen else None)
    for key, (parallel, ranks) in layouts.items():
        whose = "of this job" if ranks == world_size else "that placement=disaggregated gives it"
        layout_checks.check_layout(parallel, ranks, key, whose)
        layout_checks.check_experts(parallel, key)


def check_memory(name: str, model: ModelConfig, parallel: ParallelConfig, precision: Precision, memory: int) -> None:
    """Raise UserError for a role whose weights alone are more than a rank's memory, in bytes: nothing could be built.

    It catches slips in sizes. What a run needs in all is the planner's to say.
    """
    sizes = {key: math.prod(shape) for key, shape in tensor_shapes(model, scalar=False).items()}
    parameters = sum(size * (model.num_layers if is_layer(key) else 1) for key, size in sizes.items())
    needed = parameters * (4 if precision is Precision.fp32 else 2) / (parallel.tensor * parallel.pipeline)
    if needed > memory:
        shape = ", ".join(f"{key}={getattr(model, key)}" for key in ("num_layers", "hidden_size", "vocab_size"))
        raise UserError(
            f"{shape}: the {name} has {parameters:.3g} parameters, weights of {needed / 2**30:,.0f} GiB a rank, which has "
            f"{memory / 2**30:,.0f} GiB; give a smaller model, or split it further (parallel.tensor, parallel.pipeline)"
        )


def memory_of_rank() -> int:
    """Bytes of this rank's GPU, or of the machine where it computes on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _layouts(config: BaseConfig, world_size: int) -> dict[str, tuple[ParallelConfig, int]]:
    """Each layout of a run, by its key, and its number of ranks."""
    layouts = {"parallel": (config.parallel, world_size)}
    if isinstance(config, EvaluateConfig | ChatConfig):
        layouts["critic_parallel"] = config.critic_parallel, world_size
    if isinstance(config, PPOConfig):
        layout_checks.check_placement(config.placement, world_size)
        policy, critic = map(len, config.placement.ranks(world_size))
        layouts = {"parallel": (config.parallel, policy), "critic_parallel": (config.critic_parallel, critic)}
        if (sampling := config.rollout.parallel.of(config.parallel)) is not None:
            layouts["rollout.parallel"] = sampling, policy
    return layouts
