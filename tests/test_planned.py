"""`run.save_every=auto`: the planner's number for these GPUs, in a run and out of one."""

import re
from pathlib import Path

import pytest
from recipe import make_data

from megatron_rlhf import planned
from megatron_rlhf.cli import run_stage
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.planned import steps_between_saves
from megatron_rlhf.planning.search import cheapest
from megatron_rlhf.planning.stages import plan_stage


def ppo(*overrides: str) -> PPOConfig:
    return compose_config(
        "ppo", PPOConfig, ["recipe=instructgpt_175b", "run.save_every=auto", *overrides], missing="-"
    )[0]


def test_a_run_saves_as_often_as_its_plan_says() -> None:
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster=h100_80gb", "cluster.nodes=64"])
    steps = plan_stage(ppo(), plan_config).save_every
    assert 5 < steps < 100
    assert steps_between_saves(ppo(), 512, "NVIDIA H100 80GB HBM3") == steps
    assert steps_between_saves(ppo("run.cluster=a100_80gb"), 512, "Graphics 9000") != steps


TINY, SMALL = (ModelConfig(num_layers=2, hidden_size=64 * n, num_attention_heads=2, vocab_size=128) for n in (1, 2))


@pytest.mark.parametrize(
    ("given", "shape", "roles"),
    [
        (("reward.init_from=small",), SMALL, "policy reference reward value"),
        (("rewards.a.init_from=small", "rewards.b.function=f.py:f"), SMALL, "policy reference reward value"),
        (("reward.function=f.py:f", "value.init_from=small"), SMALL, "policy reference value"),
        (("reward.function=f.py:f",), TINY, "policy reference value"),
        (
            ("reward.function=f.py:f", "ppo.advantages=rloo", "ppo.samples_per_prompt=2"),
            None,
            "policy reference",
        ),
    ],
)
def test_a_run_is_planned_with_the_shapes_that_it_starts_from(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], shape: ModelConfig | None, roles: str
) -> None:
    shapes = {"tiny": TINY, "small": SMALL}
    monkeypatch.setattr(planned, "_shape_at", lambda path, key, role: path and shapes[path])
    config, _ = compose_config("ppo", PPOConfig, ["policy.init_from=tiny", *given], missing="-")
    planned.take_shapes(config)
    assert (config.model, config.critic_model) == (TINY, shape)
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster=laptop"])
    assert [role.name for role in plan_stage(config, plan_config).roles] == roles.split()
    assert cheapest(config, plan_config, 1)


def test_gpus_that_nobody_described_are_named() -> None:
    with pytest.raises(
        UserError, match=r"no file of conf/cluster/ describes Graphics 9000; give run\.cluster \(a100_80gb, "
    ):
        steps_between_saves(ppo(), 512, "Graphics 9000")


def test_a_run_with_auto_saves_and_ends(tmp_path: Path, world: None) -> None:
    recipe = make_data(tmp_path)
    run_stage("sft", recipe.sft("run", "run.save_every=auto"))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"run\.save_every=auto: a checkpoint every \d+ steps", text)
    assert (tmp_path / "run" / "checkpoints").is_dir()
