"""Memory, time and cost of a run, before a GPU is requested.

    megatron-rlhf plan recipe=instructgpt_175b cluster=h100_80gb cluster.nodes=64
    megatron-rlhf plan --stage ppo recipe=instructgpt_6b parallel.tensor=4 --json
    megatron-rlhf plan --presets cluster=a100_80gb
    megatron-rlhf plan --stage sft policy.init_from=llama3/ data.tokenizer=llama3/ cluster=a100_80gb cluster.nodes=2

Overrides are those of the stages; one that only some stages know goes to those. `cluster=NAME` is a file of
conf/cluster/, `cluster.*` and `workload.*` are its rates and how much text there is (megatron_rlhf/config/cluster.py).
Without --stage, all three stages are planned and added up. Shapes come from model=NAME or from the checkpoint.

Exit code: 0 if everything fits, 2 for a mistake in the settings, 3 if something does not fit (with the arithmetic).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhf.commands.outputs import require_page
from megatron_rlhf.compose import compose_config, recipes
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import keys
from megatron_rlhf.config.stages import BaseConfig
from megatron_rlhf.own_files import CONFIG_DIR
from megatron_rlhf.planned import take_shapes
from megatron_rlhf.planning.output import picture, report
from megatron_rlhf.planning.output.report import Answer
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.published.rows import RUNS
from megatron_rlhf.planning.search import cheapest, what_would_fit
from megatron_rlhf.planning.stages import STAGES, plan_stage

SCHEMAS = {name: schema for schema, name in STAGES.items()}
GROUPS = ("model", "recipe")
NOT_GIVEN = "(not given)"
USER_ERROR, DOES_NOT_FIT = 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print, and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.layouts < 0:
            raise UserError(f"--layouts {options.layouts} must be a number of layouts, or 0 for none")
        overrides = [*([f"{CONFIG_DIR}={options.config_dir}"] if options.config_dir else []), *options.overrides]
        if options.html:
            require_page(options.html, "--html")
        if options.published:
            print(report.published([(run, run.planned(_cluster(run.cluster))) for run in RUNS]))
            return 0
        if options.presets:
            print(report.presets(_presets(overrides)))
            return 0
        stages = [options.stage] if options.stage else list(SCHEMAS)
        answers = [_answer(stage, overrides, options.layouts) for stage in stages]
        if options.html:
            _write(options.html, picture.page(answers))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    _print(answers, options.json)
    refused = [answer for answer in answers if not answer.plan.fits]
    for answer in refused:
        remedy = "" if answer.remedy is None else f"; what would: {report.overrides_text(answer.remedy[0])}"
        print(f"\n{answer.plan.stage} does not fit: {answer.plan.arithmetic()}{remedy}", file=sys.stderr)
    return DOES_NOT_FIT if refused else 0


def _print(answers: Sequence[Answer], as_json: bool) -> None:
    if as_json:
        plans = [report.as_data(answer) for answer in answers]
        print(json.dumps({"schema": report.SCHEMA, "plans": plans}, indent=1))
        return
    print("\n\n\n".join(map(report.as_text, answers)))
    if len(answers) > 1:
        print("\n\n" + report.totals([answer.plan for answer in answers]))


def _write(path: str, page: str) -> None:
    try:
        Path(path).write_text(page)
    except OSError as error:
        raise UserError(f"--html {path} cannot be written: {error.strerror}") from error


def _cluster(name: str) -> ClusterConfig:
    return compose_config("plan", PlanConfig, [f"cluster={name}"])[0].cluster


def _presets(overrides: Sequence[str]) -> list[tuple[str, Plan]]:
    """Every recipe that states its number of nodes, and each of its stages."""
    return [
        (name, plan_stage(*_configs(stage, [f"recipe={name}", *overrides])))
        for name in sorted(recipes("plan"), key=_size_in_name)
        for stage in SCHEMAS
    ]


def _size_in_name(recipe: str) -> float:
    return float(recipe.split("_", 1)[1].rstrip("b").replace("_", "."))


def _answer(stage: str, overrides: Sequence[str], layouts: int) -> Answer:
    config, plan_config = _configs(stage, overrides)
    plan = plan_stage(config, plan_config)
    others = [made for _, made in cheapest(config, plan_config, layouts)] if layouts else []
    return Answer(plan, others, None if plan.fits else what_would_fit(config, plan_config))


def _configs(stage: str, overrides: Sequence[str]) -> tuple[BaseConfig, PlanConfig]:
    of_plan = [o for o in overrides if _key(o).split(".")[0] in ("cluster", "workload")]
    folders = [o for o in overrides if _key(o) == CONFIG_DIR]
    known = {name: keys(schema) for name, schema in SCHEMAS.items()}
    of_run = [
        o
        for o in overrides
        if o not in of_plan and (_known(o, known[stage]) or not any(_known(o, k) for k in known.values()))
    ]
    plan_config, _ = compose_config("plan", PlanConfig, [*folders, *of_plan, *_recipe_with_nodes(overrides)])
    config, _ = compose_config(stage, SCHEMAS[stage], of_run, missing=NOT_GIVEN)
    take_shapes(config)
    return config, plan_config


def _recipe_with_nodes(overrides: Sequence[str]) -> list[str]:
    """The recipe, if it states its number of nodes."""
    names = [o.partition("=")[2].split("/")[0] for o in overrides if _key(o) == "recipe"]
    return [f"recipe={name}" for name in names[-1:] if name in recipes("plan")]


def _known(override: str, keys: dict) -> bool:
    key = _key(override)
    return key.split("@")[-1] in keys or key in GROUPS


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(SCHEMAS), help="plan one stage (default: all of them)")
    parser.add_argument("--layouts", type=int, default=5, metavar="N", help="rank the N cheapest layouts (0: none)")
    parser.add_argument(CONFIG_DIR, metavar="DIR", help="a folder of recipe/, model/, cluster/, ... beside conf/")
    parser.add_argument("--presets", action="store_true", help="the recipes' table of docs/cluster.md, on this cluster")
    parser.add_argument("--published", action="store_true", help="published runs beside what is planned for them")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--html", metavar="FILE", help="also write a page with memory and time as bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the stage that is planned")
    return parser


if __name__ == "__main__":
    sys.exit(main())
