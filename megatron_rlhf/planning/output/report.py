"""Plans as text for people and as plain data for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_rlhf.planning.parameters import total_parameters
from megatron_rlhf.planning.placement import GIB, PlacedModel
from megatron_rlhf.planning.plan import Plan, PlannedRole, describe_layout
from megatron_rlhf.planning.published.run import PublishedRun

_LAYOUT_KEYS = (
    *("tensor", "pipeline", "virtual_stages", "context", "sequence"),
    *("distributed_optimizer", "recompute", "last_stage_layers"),
)


@dataclass(frozen=True)
class Answer:
    """What the planner says about a stage."""

    plan: Plan
    cheapest: Sequence[Plan] = ()
    """Other layouts that fit the same GPUs."""
    remedy: tuple[Mapping[str, Any], Plan] | None = None
    """For a plan that does not fit: overrides with which it does."""


SCHEMA = 2
"""Of `--json`. 2: layouts and settings are numbers, with host memory, checkpoints and what would fit."""


def as_data(answer: Answer) -> dict[str, Any]:
    """For `--json`: bytes, seconds and FLOPs, unrounded."""
    remedy = answer.remedy
    return {
        **_plan_data(answer.plan),
        "cheapest": [_plan_data(other) for other in answer.cheapest],
        "would_fit": None if remedy is None else {"overrides": _plain(remedy[0]), **_plan_data(remedy[1])},
    }


def _plan_data(plan: Plan) -> dict[str, Any]:
    rank, phase, _ = plan.fullest
    return {
        "stage": plan.stage,
        "cluster": plan.cluster.name,
        "nodes": plan.cluster.nodes,
        "gpus": plan.cluster.gpus,
        "layouts": {role.name: _layout_data(role.placed) for role in plan.roles},
        "settings": dict(plan.settings),
        "fits": plan.fits,
        "memory": {
            "bytes": plan.memory(),
            "peak_bytes": plan.peak_bytes,
            "capacity_bytes": plan.capacity_bytes,
            "fits": plan.fits_gpu,
            "fullest_rank": rank,
            "fullest_phase": phase.name,
            "phase_bytes": plan.phase_bytes(),
        },
        "host_memory": {
            "bytes": plan.host,
            "peak_bytes": plan.host_bytes,
            "capacity_bytes": plan.host_capacity_bytes,
        },
        "phases": [{"name": p.name, "seconds": p.seconds, "flops": p.flops, "bubble": p.bubble} for p in plan.phases],
        "checkpoint": {
            "bytes": plan.save.bytes,
            "seconds": plan.save.seconds,
            "save_every": plan.save_every,
        },
        "steps": plan.steps,
        "step_seconds": plan.step_seconds,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "price": plan.price,
        "flops": plan.flops,
    }


def _layout_data(placed: PlacedModel) -> dict[str, Any]:
    layout = {name: getattr(placed.parallel, name) for name in _LAYOUT_KEYS}
    return {
        **_plain(layout),
        "data": placed.data,
        "first_rank": placed.first,
        "ranks": placed.gpus,
        "parameters": total_parameters(placed.model, placed.scalar),
        "precision": placed.precision.value,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def as_text(answer: Answer) -> str:
    """The whole plan of a stage."""
    plan = answer.plan
    parts = [_heading(plan), _memory(plan), _verdict(plan), _phases(plan), _cost(plan), _checkpoints(plan)]
    if answer.cheapest:
        parts.append(_ranking(answer.cheapest))
    if answer.remedy is not None:
        parts.append(_what_would_fit(*answer.remedy))
    return "\n\n".join(parts)


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """As one writes them."""
    return " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in _plain(overrides).items())


def totals(plans: Sequence[Plan]) -> str:
    """What a recipe costs, stage by stage."""
    rows = [[plan.stage, f"{plan.hours:,.1f}", f"{plan.gpu_hours:,.0f}", f"{plan.price:,.0f}"] for plan in plans]
    sums = [sum(figures) for figures in zip(*((p.hours, p.gpu_hours, p.price) for p in plans), strict=True)]
    rows.append(["total", f"{sums[0]:,.1f}", f"{sums[1]:,.0f}", f"{sums[2]:,.0f}"])
    return _table(["stage", "hours", "GPU hours", "$"], rows)


def presets(plans: Sequence[tuple[str, Plan]]) -> str:
    """Recipes and their plans as the Markdown table of docs/cluster.md."""
    lines = [
        "| recipe, stage | model | GPUs | layout (PPO: policy; critic) | GiB | seconds a step | hours | GPU hours |"
    ]
    lines.append("|" + " --- |" * lines[0].count(" |"))
    for recipe, plan in plans:
        layouts = dict.fromkeys(describe_layout(role.placed).split(",")[0] for role in plan.roles)
        sizes = dict.fromkeys(_size(role) for role in plan.roles)
        cells = [
            f"`{recipe}` {plan.stage}",
            "; ".join(sizes),
            f"{plan.cluster.nodes} x {plan.cluster.gpus_per_node}",
            "; ".join(layouts),
            f"{plan.peak_bytes / GIB:.0f}",
            three_digits(plan.step_seconds),
            f"{plan.hours:.1f}",
            f"{plan.gpu_hours:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(role: PlannedRole) -> str:
    return f"{total_parameters(role.placed.model, role.placed.scalar) / 1e9:.3g}B"


def _heading(plan: Plan) -> str:
    cluster = plan.cluster
    lines = [f"{plan.stage} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.name}, {_settings(plan)}"]
    for role in plan.roles:
        lines.append(f"  {role.name:<10} {_size(role)}  {describe_layout(role.placed)}")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    """The fullest GPU, in GiB: one row per role, one column per kind."""
    held = plan.memory()
    kinds = list(dict.fromkeys(kind for sizes in held.values() for kind in sizes))
    rows = [
        [name, *(_gib(sizes.get(kind)) for kind in kinds), _gib(sum(sizes.values()))] for name, sizes in held.items()
    ]
    columns = [_gib(sum(sizes.get(kind, 0.0) for sizes in held.values())) for kind in kinds]
    rows.append(["total", *columns, _gib(plan.peak_bytes)])
    rank, _, _ = plan.fullest
    return f"memory of the fullest GPU (rank {rank}), GiB\n" + _table(["", *kinds, "all"], rows)


def _verdict(plan: Plan) -> str:
    cluster = plan.cluster
    state = "fits" if plan.fits else "does not fit"
    host = ", ".join(f"{kind} {size / GIB:.0f}" for kind, size in plan.host.items() if size)
    return (
        f"{state}: {plan.peak_bytes / GIB:.1f} of {plan.capacity_bytes / GIB:.1f} GiB of a GPU "
        f"({cluster.memory_gib:g} less {cluster.reserved_gib:g} reserved for CUDA, NCCL and fragmentation), and "
        f"{plan.host_bytes / GIB:.0f} of {cluster.host_memory_gib:g} GiB of a node's own memory ({host})"
    )


def _phases(plan: Plan) -> str:
    rows = [
        [
            phase.name,
            three_digits(phase.seconds),
            f"{phase.seconds / plan.step_seconds:.0%}",
            f"{phase.flops:.2e}",
            f"{phase.flops / phase.seconds / phase.placed.gpus / 1e12:.3g}",
            "" if phase.bubble is None else f"{phase.bubble:.0%}",
        ]
        for phase in plan.phases
    ]
    return _table(["phase of a step", "seconds", "share", "FLOPs", "TFLOP/s a GPU", "bubble"], rows)


def _cost(plan: Plan) -> str:
    cluster = plan.cluster
    return (
        f"{plan.steps:,} steps of {three_digits(plan.step_seconds)} s = {plan.hours:,.1f} hours x {cluster.gpus} GPUs = "
        f"{plan.gpu_hours:,.0f} GPU hours, ${plan.price:,.0f} at ${cluster.price_per_gpu_hour:g}; "
        f"{plan.flops:.2e} FLOPs ({plan.flops / 8.64e19:.3g} petaflop/s-days)"
    )


def _checkpoints(plan: Plan) -> str:
    cluster, save = plan.cluster, plan.save
    return (
        f"checkpoint: {save.bytes / GIB:,.0f} GiB, training waits {three_digits(save.seconds)} s for it; "
        f"run.save_every=auto is every {plan.save_every:,} steps ({three_digits(plan.save_every * plan.step_seconds)} s) at "
        f"a failure every {cluster.gpu_hours_per_failure:,g} GPU hours, {cluster.gpu_hours_per_failure / cluster.gpus:,.0f} "
        "hours of this job"
    )


def _what_would_fit(overrides: Mapping[str, Any], plan: Plan) -> str:
    return (
        f"what would fit: {overrides_text(overrides)}\n"
        f"  {plan.peak_bytes / GIB:.1f} GiB, {three_digits(plan.step_seconds)} s a step, {plan.cluster.gpus} GPUs, "
        f"{plan.gpu_hours:,.0f} GPU hours"
    )


def _settings(plan: Plan) -> str:
    return " ".join(f"{key}={value:g}" for key, value in plan.settings.items() if value is not None)


def _ranking(plans: Sequence[Plan]) -> str:
    """Figures on the left, beside them the layouts and settings, a line each."""
    lines = [
        f"the cheapest layouts that fit these {plans[0].cluster.gpus} GPUs",
        _ranked_line("", "GiB", "GPU hours", "$"),
    ]
    for plan in plans:
        own, *others = plan.roles
        figures = f"{plan.peak_bytes / GIB:.1f}", f"{plan.gpu_hours:,.0f}", f"{plan.price:,.0f}"
        lines.append(_ranked_line(f"{own.name}: {describe_layout(own.placed)}", *figures))
        critic = next((role for role in others if role.name.startswith(("value", "reward"))), None)
        if critic is not None:
            lines.append(_ranked_line(f"value and reward: {describe_layout(critic.placed)}"))
        lines.append(_ranked_line(_ranked_settings(plan)))
    return "\n".join(lines)


def _ranked_line(what: str, gib: str = "", hours: str = "", price: str = "") -> str:
    return f"  {gib:>6}  {hours:>10}  {price:>10}  {what}".rstrip()


def _ranked_settings(plan: Plan) -> str:
    """The numbers that a plan is ranked with, and what else it does."""
    sampler = next((role.placed.parallel for role in plan.roles if role.name == "sampler"), None)
    copy = f" rollout.parallel.pipeline={sampler.pipeline} rollout.parallel.tensor={sampler.tensor}" if sampler else ""
    resting = [role.name for role in plan.roles if role.rests]
    return _settings(plan) + copy + (f" offloaded: {', '.join(resting)}" if resting else "")


def published(runs: Sequence[tuple[PublishedRun, float]]) -> str:
    """Published runs and the planner's figures as the Markdown table of docs/planner.md."""
    lines = ["| run | GPUs | layout, batch | source | published | planned | difference |"]
    lines.append("|" + " --- |" * 4 + " ---: |" * 3)
    for run, planned in runs:
        layout = describe_layout(run.placed).split(",")[0]
        unit = run.unit.value.split(",")[0]
        lines.append(
            f"| {run.name} | {run.gpus} {run.cluster.split('_')[0].upper()} | {layout}, {run.batch_size} | {run.source} | "
            f"{three_digits(run.value)} {unit} | {three_digits(planned)} | {planned / run.value - 1:+.1%} |"
        )
    return "\n".join(lines)


def three_digits(x: float) -> str:
    """Formats such as 0.0694, 35.0, 1,234."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content: the first left-aligned, figures right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "  ".join(parts).rstrip()

    return "\n".join([line(header), "  " + "  ".join("-" * width for width in widths), *map(line, rows)])
