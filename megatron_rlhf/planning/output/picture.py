"""Plans as a page: memory of the fullest GPU by kind, peaks by phase, time by phase, as bars. It needs no network."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from megatron_rlhf.planning.output.report import Answer, overrides_text, three_digits
from megatron_rlhf.planning.placement import GIB
from megatron_rlhf.planning.plan import Plan, describe_layout

_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#999999", "#dd8844", "#5566bb", "#77aa99")
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 0 auto; padding: 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.2em; margin: 2em 0 .3em; } h3 { font-size: 1em; margin: 1.2em 0 .3em; }
p { margin: .3em 0; } code { overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: 15em 1fr 7em; gap: .6em; align-items: center; margin: .2em 0; }
.track { position: relative; height: 1.5em; background: var(--bar); }
.bar { display: flex; height: 100%; } .bar span { height: 100%; min-width: 1px; }
.limit { position: absolute; top: -.2em; bottom: -.2em; border-left: 2px solid #d22; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1em; margin: .4em 0; font-size: .9em; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.no { color: #d22; font-weight: 600; }
@media (max-width: 40em) { .row { grid-template-columns: 1fr 5.5em; } .row .track { grid-column: 1 / -1; grid-row: 2; } }
"""


def page(answers: Sequence[Answer]) -> str:
    """The page of one or several stages."""
    parts = "\n".join(_stage(answer) for answer in answers)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Plan</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>Memory and time before a GPU is requested</h1>\n{parts}\n</body></html>\n"
    )


def _stage(answer: Answer) -> str:
    plan, cluster = answer.plan, answer.plan.cluster
    verdict = "fits" if plan.fits else '<span class="no">does not fit</span>'
    parts = [
        f"<h2>{escape(plan.stage)} on {cluster.nodes} x {cluster.gpus_per_node} {escape(cluster.name)}: {verdict}</h2>",
        *(f"<p>{escape(role.name)}: {escape(describe_layout(role.placed))}</p>" for role in plan.roles),
        "<h3>Memory of the fullest GPU, GiB</h3>",
        _memory(plan),
        "<h3>The most that a GPU holds in each phase, GiB</h3>",
        _rows(plan.phase_bytes(), plan.capacity_bytes, GIB),
        "<h3>Memory of the fullest node's host, GiB</h3>",
        _rows({"all of a node": plan.host_bytes} | plan.host, plan.host_capacity_bytes, GIB),
        f"<h3>Seconds of a step: {three_digits(plan.step_seconds)}</h3>",
        _rows({phase.name: phase.seconds for phase in plan.phases}, None, 1),
        f"<p>{plan.steps:,} steps: {plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU hours, ${plan.price:,.0f}. A checkpoint "
        f"takes {three_digits(plan.save.seconds)} s; <code>run.save_every=auto</code> is every {plan.save_every:,} steps.</p>",
    ]
    if answer.remedy is not None:
        parts.append(f"<p>What would fit: <code>{escape(overrides_text(answer.remedy[0]))}</code></p>")
    return "\n".join(parts)


def _memory(plan: Plan) -> str:
    """One bar a role, by kind; their sum against what a GPU has."""
    held = plan.memory()
    kinds = list(dict.fromkeys(kind for sizes in held.values() for kind in sizes))
    colors = {kind: _COLORS[i % len(_COLORS)] for i, kind in enumerate(kinds)}
    whole = {kind: sum(sizes.get(kind, 0.0) for sizes in held.values()) for kind in kinds}
    scale = max(plan.capacity_bytes, plan.peak_bytes)
    rows = [_row(name, _segments(sizes, colors, scale), sum(sizes.values()) / GIB) for name, sizes in held.items()]
    rows.append(_row("all", _segments(whole, colors, scale), plan.peak_bytes / GIB, plan.capacity_bytes / scale))
    named = [(kind, colors[kind], f"{whole[kind] / GIB:.1f}") for kind in kinds]
    legend = "".join(f'<span><i style="background:{color}"></i>{escape(k)} {size}</span>' for k, color, size in named)
    limit = f'<span><i style="background:#d22;width:2px"></i>what a GPU has for training: {plan.capacity_bytes / GIB:.1f}</span>'
    return "\n".join(rows) + f'\n<div class="legend">{legend}{limit}</div>'


def _rows(sizes: Mapping[str, float], limit: float | None, unit: float) -> str:
    scale = max([*sizes.values(), limit or 0.0])
    line = None if limit is None else limit / scale
    return "\n".join(
        _row(name, [(name, _COLORS[0], size / scale if scale else 0.0)], size / unit, line)
        for name, size in sizes.items()
    )


def _segments(sizes: Mapping[str, float], colors: Mapping[str, str], scale: float) -> list[tuple[str, str, float]]:
    return [(f"{kind} {size / GIB:.2f} GiB", colors[kind], size / scale) for kind, size in sizes.items()]


def _row(name: str, segments: Iterable[tuple[str, str, float]], figure: float, limit: float | None = None) -> str:
    bar = "".join(
        f'<span style="width:{100 * share:.2f}%;background:{color}" title="{escape(title)}"></span>'
        for title, color, share in segments
        if share > 0
    )
    line = "" if limit is None else f'<div class="limit" style="left:{100 * limit:.2f}%"></div>'
    return (
        f'<div class="row"><div>{escape(name)}</div><div class="track"><div class="bar">{bar}</div>{line}</div>'
        f'<div class="figure">{three_digits(figure)}</div></div>'
    )
