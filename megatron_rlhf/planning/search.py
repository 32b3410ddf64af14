"""Other layouts for the same run on the same GPUs: those that fit, the cheapest first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.layout_checks import check_layout, check_model
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Recompute
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.stages import plan_stage, stage_name

MICRO_BATCH_SIZES = (1, 2, 4, 8)


def cheapest(config: BaseConfig, plan: PlanConfig, count: int) -> list[Plan]:
    """The `count` fastest plans that fit; the GPUs are given, so the fastest is the cheapest."""
    assert config.model is not None
    cluster = plan.cluster_for(stage_name(config))
    gpus = critic_gpus = cluster.gpus
    if isinstance(config, PPOConfig):
        gpus, critic_gpus = map(len, config.placement.ranks(cluster.gpus))
    layouts = _layouts(config.model, cluster, gpus)
    if isinstance(config, PPOConfig):
        assert config.critic_model is not None
        critics = _by_speed(config, plan, _layouts(config.critic_model, cluster, critic_gpus))
        found = [_first_that_fits(base, plan, critics) for base in _with_layouts(config, layouts)]
    else:
        found = [_if_it_fits(candidate, plan) for candidate in _with_layouts(config, layouts)]
    return sorted((p for p in found if p is not None), key=lambda p: p.gpu_hours)[:count]


def _layouts(model: ModelConfig, cluster: ClusterConfig, gpus: int) -> list[ParallelConfig]:
    """Layouts without context parallelism or virtual stages, tensor parallelism inside a node."""
    sizes = [t for t in (1, 2, 4, 8, 16) if cluster.gpus_per_node % t == 0]
    stages = [p for p in range(1, model.num_layers + 1) if model.num_layers % p == 0]
    found = []
    for t, p, recompute in product(sizes, stages, (Recompute.none, Recompute.full)):
        parallel = ParallelConfig(
            tensor=t, pipeline=p, sequence=t > 1, distributed_optimizer=gpus > t * p, recompute=recompute
        )
        try:
            check_layout(parallel, gpus, "parallel")
            check_model(model, parallel, "parallel")
        except UserError:
            continue
        found.append(parallel)
    return found


def _with_layouts(config: BaseConfig, layouts: Sequence[ParallelConfig]) -> Iterator[BaseConfig]:
    for parallel, micro in product(layouts, MICRO_BATCH_SIZES):
        yield _with_micro_batch(replace(config, parallel=parallel), micro)


def _with_micro_batch(config: BaseConfig, size: int) -> BaseConfig:
    if isinstance(config, PPOConfig):
        ppo = replace(config.ppo, micro_batch_size=size, micro_batch_tokens=None)
        return replace(config, ppo=replace(ppo, ptx_micro_batch_size=size, ptx_micro_batch_tokens=None))
    if isinstance(config, RewardModelConfig):
        algorithm = replace(config.reward_model, micro_batch_size=size, micro_batch_tokens=None)
        return replace(config, reward_model=algorithm)
    assert isinstance(config, SFTConfig)
    return replace(config, sft=replace(config.sft, micro_batch_size=size, micro_batch_tokens=None))


def _by_speed(config: PPOConfig, plan: PlanConfig, layouts: list[ParallelConfig]) -> list[ParallelConfig]:
    """The critic's layouts, fastest first, near-ties by least memory; the policy's layout has no effect."""

    def order(parallel: ParallelConfig) -> tuple[int, float]:
        candidate = plan_stage(replace(config, critic_parallel=parallel), plan)
        return round(math.log(candidate.step_seconds, 1.03)), candidate.peak_bytes

    return sorted(layouts, key=order)


def _first_that_fits(config: BaseConfig, plan: PlanConfig, critics: Sequence[ParallelConfig]) -> Plan | None:
    assert isinstance(config, PPOConfig)
    for critic in critics:
        if found := _if_it_fits(replace(config, critic_parallel=critic), plan):
            return found
    return None


def _if_it_fits(config: BaseConfig, plan: PlanConfig) -> Plan | None:
    found = plan_stage(config, plan)
    return found if found.fits else None
