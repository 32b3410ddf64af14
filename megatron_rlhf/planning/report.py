"""Plans as text for people and as plain data for programs."""

from collections.abc import Sequence
from typing import Any

from megatron_rlhf.planning.parameters import total_parameters
from megatron_rlhf.planning.placement import GIB
from megatron_rlhf.planning.plan import Plan, PlannedRole, describe_layout


def as_data(plan: Plan, cheaper: Sequence[Plan] = ()) -> dict[str, Any]:
    """For `--json`: bytes, seconds and FLOPs, unrounded."""
    rank, phase, _ = plan.fullest
    return {
        "stage": plan.stage,
        "cluster": plan.cluster.name,
        "gpus": plan.cluster.gpus,
        "layouts": plan.layouts,
        "microbatch": plan.microbatch,
        "memory": {
            "bytes": plan.memory(),
            "peak_bytes": plan.peak_bytes,
            "capacity_bytes": plan.capacity_bytes,
            "fits": plan.fits,
            "fullest_rank": rank,
            "fullest_phase": phase.name,
        },
        "phases": [{"name": p.name, "seconds": p.seconds, "flops": p.flops, "bubble": p.bubble} for p in plan.phases],
        "steps": plan.steps,
        "step_seconds": plan.step_seconds,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "price": plan.price,
        "flops": plan.flops,
        "cheapest": [as_data(other) for other in cheaper],
    }


def as_text(plan: Plan, cheaper: Sequence[Plan] = ()) -> str:
    """The whole plan of a stage."""
    parts = [_heading(plan), _memory(plan), _verdict(plan), _phases(plan), _cost(plan)]
    if cheaper:
        parts.append(_ranking(cheaper))
    return "\n\n".join(parts)


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
            _three_digits(plan.step_seconds),
            f"{plan.hours:.1f}",
            f"{plan.gpu_hours:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(role: PlannedRole) -> str:
    return f"{total_parameters(role.placed.model, role.placed.scalar) / 1e9:.3g}B"


def _heading(plan: Plan) -> str:
    cluster = plan.cluster
    lines = [f"{plan.stage} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.name}, {plan.microbatch}"]
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
    return (
        f"{state}: {plan.peak_bytes / GIB:.1f} of {plan.capacity_bytes / GIB:.1f} GiB "
        f"({cluster.memory_gib:g} less {cluster.reserved_gib:g} reserved for CUDA, NCCL and fragmentation)"
    )


def _phases(plan: Plan) -> str:
    rows = [
        [
            phase.name,
            _three_digits(phase.seconds),
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
        f"{plan.steps:,} steps of {_three_digits(plan.step_seconds)} s = {plan.hours:,.1f} hours x {cluster.gpus} GPUs = "
        f"{plan.gpu_hours:,.0f} GPU hours, ${plan.price:,.0f} at ${cluster.price_per_gpu_hour:g}; "
        f"{plan.flops:.2e} FLOPs ({plan.flops / 8.64e19:.3g} petaflop/s-days)"
    )


def _ranking(plans: Sequence[Plan]) -> str:
    rows = []
    for plan in plans:
        layouts = {role.name: describe_layout(role.placed) for role in plan.roles}
        own = layouts[plan.roles[0].name]
        critic = next((layout for role, layout in layouts.items() if role.startswith(("value", "reward"))), "")
        rows.append(
            [
                own,
                critic,
                plan.microbatch,
                f"{plan.peak_bytes / GIB:.1f}",
                f"{plan.gpu_hours:,.0f}",
                f"{plan.price:,.0f}",
            ]
        )
    header = [plans[0].roles[0].name, "value and reward", "microbatches", "GiB", "GPU hours", "$"]
    if not any(row[1] for row in rows):
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return f"the cheapest layouts that fit these {plans[0].cluster.gpus} GPUs\n" + _table(header, rows)


def _three_digits(x: float) -> str:
    """Formats such as 0.0694, 35.0, 1,234."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content: the first left-aligned, figures right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if i and not cell.startswith("tensor") else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "  ".join(parts).rstrip()

    return "\n".join([line(header), "  " + "  ".join("-" * width for width in widths), *map(line, rows)])
