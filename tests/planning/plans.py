"""Plans as functions, and the command line of tools/plan.py."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_rlhf.compose import compose_config, recipes
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.stages import STAGES, plan_stage

ROOT = Path(__file__).resolve().parents[2]
Tool = Callable[..., int]


def load_tool() -> Tool:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main(list(arguments))


def plan(stage: str, *overrides: str, ours: tuple[str, ...] = ()) -> Plan:
    schema = {name: schema for schema, name in STAGES.items()}[stage]
    config, _ = compose_config(stage, schema, list(overrides), missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, list(ours))
    return plan_stage(config, plan_config)


def sized_recipes() -> list[str]:
    """Recipes that state the number of nodes they are made for."""
    return recipes("plan")
