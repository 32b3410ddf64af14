"""Other layouts for the same run on the same GPUs: those that fit, the cheapest first; and what would fit where nothing does."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from megatron_rlhf.config.checking.layout_checks import check_layout, check_model
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Recompute
from megatron_rlhf.config.stages import BaseConfig, PPOConfig
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.ppo import has_critics
from megatron_rlhf.planning.stages import stage_name
from megatron_rlhf.planning.variations import (
    changes,
    faster_sampling,
    fewer_slots,
    micro_batch,
    offloads,
    plan_if_possible,
    remedies,
    sharded,
    varied,
)

Candidate = tuple[BaseConfig, Plan]
MICRO_BATCH_SIZES = (1, 2, 4, 8)
TIE = 1.03
"""Plans that differ by less are equally fast: the model is not that exact."""
MOST_NODES = 512
CRITICS = 8
"""Layouts of the critic that are tried with each of the policy's: the fastest ones, and the one that needs least memory."""


def what_would_fit(config: BaseConfig, plan: PlanConfig) -> tuple[dict[str, Any], Plan] | None:
    """The smallest change with which a run fits: a setting, another layout, more nodes. None if nothing helps."""
    for overrides in remedies(config):
        if (found := _if_it_fits(varied(config, overrides), plan)) is not None:
            return changes(config, found[0]), found[1]
    if other := cheapest(config, plan, 1):
        return changes(config, other[0][0]), other[0][1]
    nodes = plan.cluster_for(stage_name(config)).nodes or 1
    while (nodes := 2 * nodes) <= MOST_NODES:
        larger = replace(plan, cluster=replace(plan.cluster, nodes=nodes))
        for overrides in ({}, sharded(config)):
            if (found := _if_it_fits(varied(config, overrides), larger)) is not None:
                return {"cluster.nodes": nodes, **changes(config, found[0])}, found[1]
        if other := cheapest(config, larger, 1):
            return {"cluster.nodes": nodes, **changes(config, other[0][0])}, other[0][1]
    return None


def cheapest(config: BaseConfig, plan: PlanConfig, count: int) -> list[Candidate]:
    """The `count` fastest plans that fit; the GPUs are given, so the fastest is the cheapest. Ties go to fewer stages.

    Fewer slots, offloading, context parallelism are tried where nothing fits without them.
    """
    resting = [slots | rest for rest in offloads(config) for slots in fewer_slots(config)]
    for contexts, rest in ([1], [{}]), ([1], resting[1:]), ([2, 4], resting):
        found = _fitting(config, plan, contexts, rest)
        if found:
            best = _best_of_each_layout(found)[: 2 * count]
            if isinstance(config, PPOConfig):
                best = [_with_best_sampling(one, made, plan) for one, made in best]
            return _ranked(best)[:count]
    return []


def _fitting(config: BaseConfig, plan: PlanConfig, contexts: Sequence[int], resting: Sequence[dict]) -> list[Candidate]:
    assert config.model is not None
    cluster = plan.cluster_for(stage_name(config))
    gpus = critic_gpus = cluster.gpus
    critics: list[ParallelConfig] = []
    virtual = [1, 2, 4]
    if isinstance(config, PPOConfig):
        gpus, critic_gpus = map(len, config.placement.ranks(cluster.gpus))
        critics = [config.critic_parallel]
        if has_critics(config):
            assert config.critic_model is not None
            layouts = list(_layouts(config.critic_model, cluster, critic_gpus, [1], virtual))
            critics = critics_by_speed(config, plan, layouts)
        virtual = [1]  # decoding goes through plain stages
    found = []
    for parallel, size in product(_layouts(config.model, cluster, gpus, contexts, virtual), MICRO_BATCH_SIZES):
        base = varied(replace(config, parallel=parallel), micro_batch(config, size))
        if (fitting := _first_that_fits(base, plan, critics, resting)) is not None:
            found.append(fitting)
    return found


def _layouts(
    model: ModelConfig, cluster: ClusterConfig, gpus: int, contexts: Sequence[int], virtual: Sequence[int]
) -> Iterator[ParallelConfig]:
    """Tensor parallelism inside a node, sequence parallelism with it, sharded optimizers where there is more than one copy."""
    sizes = [t for t in (1, 2, 4, 8, 16) if cluster.gpus_per_node % t == 0]
    stages = [p for p in range(1, model.num_layers + 1) if model.num_layers % p == 0]
    for t, p, v, c, recompute in product(sizes, stages, virtual, contexts, (Recompute.none, Recompute.full)):
        parallel = ParallelConfig(
            tensor=t,
            pipeline=p,
            virtual_stages=v,
            context=c,
            sequence=t > 1,
            distributed_optimizer=gpus > t * p,
            recompute=recompute,
        )
        try:
            check_layout(parallel, gpus, "parallel")
            check_model(model, parallel, "parallel")
        except UserError:
            continue
        yield parallel


def critics_by_speed(config: PPOConfig, plan: PlanConfig, layouts: Sequence[ParallelConfig]) -> list[ParallelConfig]:
    """The critic's fastest layouts, ties by fewer stages, and the one of least memory; the policy's layout has no effect."""
    candidates = [replace(config, critic_parallel=layout) for layout in layouts]
    plans: list[Candidate] = [(one, made) for one in candidates if (made := plan_if_possible(one, plan)) is not None]
    fastest = [_critic_layout(one) for one, _ in _ranked(plans)]
    smallest = _critic_layout(min(plans, key=lambda entry: entry[1].peak_bytes)[0])
    return [*(layout for layout in fastest[:CRITICS] if layout != smallest), smallest]


def _critic_layout(config: BaseConfig) -> ParallelConfig:
    assert isinstance(config, PPOConfig)
    return config.critic_parallel


def _first_that_fits(
    config: BaseConfig, plan: PlanConfig, critics: Sequence[ParallelConfig], resting: Sequence[dict]
) -> Candidate | None:
    for rest in resting:
        one = varied(config, rest)
        if not isinstance(one, PPOConfig):
            return _if_it_fits(one, plan)
        if _if_it_fits(replace(one, critic_parallel=critics[-1]), plan) is None:
            continue  # not even with the critic that needs least
        for critic in critics:
            if (found := _if_it_fits(replace(one, critic_parallel=critic), plan)) is not None:
                return found
    return None


def _if_it_fits(config: BaseConfig, plan: PlanConfig) -> Candidate | None:
    made = plan_if_possible(config, plan)
    return None if made is None or not made.fits else (config, made)


def _best_of_each_layout(found: Sequence[Candidate]) -> list[Candidate]:
    """Of each layout the best micro batch, the best layout first."""
    best: dict[str, Candidate] = {}
    for config, made in sorted(found, key=lambda entry: entry[1].step_seconds):
        best.setdefault(str(config.parallel), (config, made))
    return _ranked(list(best.values()))


def _with_best_sampling(config: BaseConfig, made: Plan, plan: PlanConfig) -> Candidate:
    assert isinstance(config, PPOConfig)
    best: Candidate = config, made
    for overrides in faster_sampling(config, plan.cluster.gpus_per_node):
        found = _if_it_fits(varied(config, overrides), plan)
        if found is not None and found[1].step_seconds < best[1].step_seconds / TIE:
            best = found
    return best


def _ranked(found: list[Candidate]) -> list[Candidate]:
    """The fastest first; of those that tie with the fastest that is left, the one with the fewest stages."""
    left = sorted(found, key=lambda entry: entry[1].step_seconds)
    ranked = []
    while left:
        ties = [entry for entry in left if entry[1].step_seconds <= TIE * left[0][1].step_seconds]
        best = min(ties, key=lambda entry: (_stages(entry[0]), entry[1].step_seconds, entry[1].peak_bytes))
        ranked.append(best)
        left.remove(best)
    return ranked


def _stages(config: BaseConfig) -> int:
    layouts = [config.parallel, *([config.critic_parallel] if isinstance(config, PPOConfig) else [])]
    return sum(layout.pipeline * layout.virtual_stages for layout in layouts)
