"""Memory, time and cost of a run, before a GPU is requested.

    python tools/plan.py recipe=instructgpt_175b cluster=h100_80gb cluster.nodes=64
    python tools/plan.py --stage ppo recipe=instructgpt_6b parallel.tensor=4 --json
    python tools/plan.py --presets cluster=a100_80gb
    python tools/plan.py --stage sft policy.init_from=llama3/ data.tokenizer=llama3/ cluster=a100_80gb cluster.nodes=2

Overrides are those of the stages; one that only some stages know goes to those. `cluster=NAME` is a file of
conf/cluster/, `cluster.*` and `workload.*` are its rates and how much text there is (megatron_rlhf/config/cluster.py).
Without --stage, all three stages are planned and added up. Shapes come from model=NAME or from the checkpoint.

Exit code: 0 if everything fits, 2 for a mistake in the settings, 3 if something does not fit (with the arithmetic).
"""

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_rlhf.compose import compose_config, recipes
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import keys
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig
from megatron_rlhf.planning import report
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.search import cheapest
from megatron_rlhf.planning.stages import STAGES, plan_stage

SCHEMAS = {name: schema for schema, name in STAGES.items()}
GROUPS = ("model", "recipe")
NOT_GIVEN = "(not given)"
USER_ERROR, DOES_NOT_FIT = 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print, and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.presets:
            print(report.presets(_presets(options.overrides)))
            return 0
        stages = [options.stage] if options.stage else list(SCHEMAS)
        plans = [_plan(stage, options.overrides, options.layouts) for stage in stages]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if options.json:
        print(json.dumps([report.as_data(*plan) for plan in plans], indent=1))
    else:
        print("\n\n\n".join(report.as_text(*plan) for plan in plans))
        if len(plans) > 1:
            print("\n\n" + report.totals([plan for plan, _ in plans]))
    refused = [plan for plan, _ in plans if not plan.fits]
    for plan in refused:
        print(f"\n{plan.stage} does not fit: {plan.arithmetic()}", file=sys.stderr)
    return DOES_NOT_FIT if refused else 0


def _presets(overrides: Sequence[str]) -> list[tuple[str, Plan]]:
    """Every recipe that states its number of nodes, and each of its stages."""
    return [
        (name, _plan(stage, [f"recipe={name}", *overrides], layouts=0)[0])
        for name in sorted(recipes("plan"), key=_size_in_name)
        for stage in SCHEMAS
    ]


def _size_in_name(recipe: str) -> float:
    return float(recipe.split("_", 1)[1].rstrip("b").replace("_", "."))


def _plan(stage: str, overrides: Sequence[str], layouts: int) -> tuple[Plan, list[Plan]]:
    ours = [o for o in overrides if _key(o).split(".")[0] in ("cluster", "workload")]
    known = {name: keys(schema) for name, schema in SCHEMAS.items()}
    theirs = [
        o
        for o in overrides
        if o not in ours and (_known(o, known[stage]) or not any(_known(o, k) for k in known.values()))
    ]
    plan_config, _ = compose_config("plan", PlanConfig, [*ours, *_recipe_with_nodes(overrides)])
    config, _ = compose_config(stage, SCHEMAS[stage], theirs, missing=NOT_GIVEN)
    _take_shapes(config)
    return plan_stage(config, plan_config), cheapest(config, plan_config, layouts) if layouts else []


def _recipe_with_nodes(overrides: Sequence[str]) -> list[str]:
    """The recipe, if it states its number of nodes."""
    names = [o.split("=")[1].split("/")[0] for o in overrides if _key(o) == "recipe"]
    return [f"recipe={name}" for name in names[-1:] if name in recipes("plan")]


def _known(override: str, keys: dict) -> bool:
    key = _key(override)
    return key.split("@")[-1] in keys or key in GROUPS


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _take_shapes(config: BaseConfig) -> None:
    """Shapes that the configuration leaves to the checkpoints it starts from."""
    trained = "reward" if isinstance(config, RewardModelConfig) else "policy"
    sources = [("model", trained)] + ([("critic_model", "reward")] if isinstance(config, PPOConfig) else [])
    for key, role in sources:
        path = getattr(config, role).init_from
        if getattr(config, key) is None and path is not None:
            from megatron_rlhf.conversion import starting_point  # imports Megatron-Core: seconds

            wanted = starting_point.POLICY if role == "policy" else starting_point.TRAINED_REWARD
            setattr(config, key, starting_point.StartingPoint.find(path, f"{role}.init_from", wanted).model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(SCHEMAS), help="plan one stage (default: all of them)")
    parser.add_argument("--layouts", type=int, default=5, metavar="N", help="rank the N cheapest layouts (0: none)")
    parser.add_argument("--presets", action="store_true", help="the recipes' table of docs/cluster.md, on this cluster")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the stage that is planned")
    return parser


if __name__ == "__main__":
    sys.exit(main())
