"""Layouts that are looked for: the cheapest, and what would fit where a plan does not."""

from dataclasses import replace

import pytest
from plans import plan

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.planning.output.report import overrides_text
from megatron_rlhf.planning.search import TIE, cheapest, critics_by_speed, what_would_fit
from megatron_rlhf.planning.stages import STAGES, plan_stage


def test_cheapest_layouts_fit_and_ties_go_to_fewer_stages() -> None:
    config, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_6b"], missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster.nodes=2"])
    found = [made for _, made in cheapest(config, plan_config, 5)]
    assert len(found) == 5
    assert all(p.fits for p in found)
    seconds = [p.step_seconds for p in found]
    assert all(one <= TIE * min(seconds[i:]) for i, one in enumerate(seconds))
    wide = replace(plan_config, cluster=replace(plan_config.cluster, nodes=64))
    large, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_175b"], missing="-")
    shapes = [ParallelConfig(tensor=8, pipeline=p, sequence=True, distributed_optimizer=True) for p in (32, 1, 8)]
    best = critics_by_speed(large, wide, shapes)[0]
    assert best.pipeline == 1, "32 stages of a 6.7B critic save nothing"
    tiny = replace(plan_config, cluster=replace(plan_config.cluster, memory_gib=9.0))
    assert cheapest(config, tiny, 5) == []


def test_the_search_offloads_where_nothing_fits_without() -> None:
    config, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_6b"], missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster.nodes=2", "cluster.memory_gib=26"])
    found = [made for _, made in cheapest(config, plan_config, 2)]
    assert found
    for made in found:
        assert made.fits
        assert any(role.rests for role in made.roles)
        assert any(phase.name.startswith("copies of") for phase in made.phases)


def test_one_stage_samples_faster_than_eight() -> None:
    ours = ("recipe=instructgpt_175b",)
    plain = plan("ppo", *ours, "rollout.batch_size=64", ours=ours)
    copied = plan("ppo", *ours, "rollout.parallel.pipeline=1", ours=ours)
    seconds = [made.phases[0].seconds for made in (plain, copied)]
    assert seconds[1] < 0.7 * seconds[0]


@pytest.mark.parametrize(
    ("stage", "overrides", "cluster", "changes"),
    [
        ("sft", ["recipe=instructgpt_6b"], ["cluster.memory_gib=41"], {"sft.micro_batch_size"}),
        ("sft", ["recipe=instructgpt_6b", "parallel.tensor=1"], ["cluster.memory_gib=30"], {"parallel.tensor"}),
        ("ppo", ["recipe=instructgpt_6b"], ["cluster.nodes=2", "cluster.memory_gib=50"], {"offload.reference"}),
        ("ppo", ["recipe=instructgpt_6b"], ["cluster.nodes=1", "cluster.memory_gib=24"], {"cluster.nodes"}),
    ],
)
def test_what_does_not_fit_is_told_what_would(
    stage: str, overrides: list[str], cluster: list[str], changes: set[str]
) -> None:
    schema = {name: schema for schema, name in STAGES.items()}[stage]
    config, _ = compose_config(stage, schema, overrides, missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, cluster)
    assert not plan_stage(config, plan_config).fits
    remedy = what_would_fit(config, plan_config)
    assert remedy is not None
    assert changes <= set(remedy[0]), remedy[0]
    written = overrides_text(remedy[0]).split()
    again, _ = compose_config(stage, schema, overrides + [o for o in written if "cluster." not in o], missing="-")
    nodes = [o for o in written if "cluster." in o]
    assert plan_stage(again, compose_config("plan", PlanConfig, cluster + nodes)[0]).fits
