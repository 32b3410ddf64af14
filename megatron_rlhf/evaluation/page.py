"""All of an evaluation on one page: reward models, policies side by side, the frontier of reward against KL, samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.evaluation.estimates import Estimate
from megatron_rlhf.evaluation.policies import Scores, WinRate, best_of_n, means, win_rates, win_rates_by_people
from megatron_rlhf.evaluation.results import Run
from megatron_rlhf.evaluation.reward_accuracy import (
    Pair,
    accuracy,
    accuracy_by,
    by_length,
    calibration,
    pairs_of,
    prefers_longer,
)
from megatron_rlhf.monitoring.charts import Chart, Point, point_chart
from megatron_rlhf.monitoring.report import Page, Section, make_table, write_page
from megatron_rlhf.monitoring.samples import SampleColumn, sample_column

TAX = ("tax/", "benchmark/")
SAMPLES = 6


def write_evaluation(
    path: Path,
    title: str,
    policies: Sequence[Run] = (),
    reward_models: Sequence[Run] = (),
    training: Sequence[Run] = (),
    rankings: Sequence[Mapping[str, Any]] = (),
    command: str = "",
) -> Path:
    """Write the page; what was not measured is left out.

    Args:
        policies: evaluations with answers, in the order in which they are compared; the first is the one whose samples the
            best of n is taken from.
        reward_models: evaluations with comparisons that were scored.
        training: PPO runs, for the frontier.
        rankings: of people, with sources.
        command: what makes this page.
    """
    sections = [_reward_section(run) for run in reward_models]
    if policies:
        sections.append(_policy_section(policies))
        sections += _win_sections(policies, rankings)
    elif rankings:
        sections += _win_sections((), rankings)
    frontier = _frontier(policies, training)
    if frontier.charts:
        sections.append(frontier)
    runs = [*policies, *reward_models, *training]
    page = Page(
        title=title,
        kind="Evaluation",
        facts=[f"{len(runs)} runs", "± standard error and 95% intervals over prompts"],
        sections=sections,
        samples=_samples(policies),
        details=[("This page", command), *((f"{run.name}: {run.folder}", run.command) for run in runs)],
    )
    return write_page(page, path)


def _reward_section(run: Run) -> Section:
    pairs = pairs_of(run.judged)
    groups = accuracy_by(pairs, lambda pair: pair.group)
    rows = [{"comparisons": "all", **_shown(accuracy(pairs))}]
    if len(groups) > 1:
        rows += [{"comparisons": group.replace("_", "-"), **_shown(found)} for group, found in groups.items()]
    rows += [{"comparisons": f"K = {k}", **_shown(found)} for k, found in accuracy_by(pairs, lambda p: p.k).items()]
    longer = "No comparison has responses of different lengths."
    if (preferred := prefers_longer(pairs)) is not None:
        people, model = preferred
        longer = (
            f"The longer response is preferred in {people.mean:.1f}% of the comparisons by people and in {model.mean:.1f}% by "
            "the model."
        )
    length = [{"the preferred response": name, **_shown(found)} for name, found in by_length(pairs).items()]
    bins, gap = calibration(pairs)
    return Section(
        f"Reward model {run.name}",
        charts=[_calibration_chart(pairs), _length_chart(pairs)],
        tables=[
            make_table(rows, "Accuracy on people's comparisons"),
            make_table(length, "Accuracy by length"),
        ],
        text=f"{longer} Expected calibration error: {gap:.1f} percent points over {len(bins)} bins of confidence.",
    )


def _shown(found: Estimate) -> dict[str, Any]:
    return {
        "accuracy, %": (found.mean, found.error),
        "95% interval": f"{found.low:.1f} to {found.high:.1f}",
        "pairs": found.count,
    }


def _calibration_chart(pairs: Sequence[Pair]) -> Chart:
    bins, _ = calibration(pairs)
    measured = [Point(part.confidence, part.accuracy.mean, part.accuracy.low, part.accuracy.high) for part in bins]
    return point_chart(
        "Calibration",
        "accuracy, %",
        "confidence, %",
        {"reward model": measured, "perfect": [Point(50, 50), Point(100, 100)]},
    )


def _length_chart(pairs: Sequence[Pair]) -> Chart:
    points = [
        Point(place, found.mean, found.low, found.high)
        for place, found in enumerate(by_length(pairs).values(), start=1)
    ]
    return point_chart("Accuracy by length", "accuracy, %", "row of the table", {"": points})


def _policy_section(policies: Sequence[Run]) -> Section:
    """The alignment tax and everything else that has one figure a policy."""
    rows = []
    for run in policies:
        figures = run.figures()
        row: dict[str, Any] = {"policy": run.name}
        for title, scores in (("reward model's score", run.scores), ("rule's score", run.golds())):
            if scores:
                found = means(scores)
                row[title] = (found.mean, found.error)
        if "rollout/response_length_mean" in figures:
            row["tokens"] = figures["rollout/response_length_mean"]
            row["stopped, %"] = 100 * figures.get("rollout/stop_fraction", float("nan"))
        for name, value in figures.items():
            if name.startswith(TAX):
                row[name.partition("/")[2].replace("_", " ")] = value
        rows.append(row)
    return Section("Policies", tables=[make_table(rows)])


def _win_sections(policies: Sequence[Run], rankings: Sequence[Mapping[str, Any]]) -> list[Section]:
    judges: dict[str, dict[tuple[str, str], WinRate]] = {
        "By the reward model": win_rates({run.name: run.scores for run in policies}),
        "By the rule": win_rates({run.name: run.golds() for run in policies}),
        "By people": win_rates_by_people(rankings),
    }
    order = [run.name for run in policies]
    tables = [make_table(_win_rows(rates, order), title) for title, rates in judges.items() if rates]
    text = "How often the policy of the row beats that of the column, in percent; a tie counts half."
    return [Section("Win rates", tables=tables, text=text)] if tables else []


def _win_rows(rates: Mapping[tuple[str, str], WinRate], order: Sequence[str]) -> list[dict[str, Any]]:
    known = dict.fromkeys(name for pair in rates for name in pair)
    names = [name for name in order if name in known] + [name for name in known if name not in order]
    rows = []
    for one in names:
        row: dict[str, Any] = {"policy": one}
        for other in names:
            found = rates.get((one, other))
            row[other] = None if found is None else _win(found)
        ties = [rates[one, other].ties for other in names if (one, other) in rates]
        row["ties, %"] = sum(ties) / len(ties)
        rows.append(row)
    return rows


def _win(found: WinRate) -> str:
    return f"{found.wins.mean:.1f} ({found.wins.low:.1f} to {found.wins.high:.1f})"


def _frontier(policies: Sequence[Run], training: Sequence[Run]) -> Section:
    """Reward against KL: over the updates of PPO runs, and over n of the best of n samples."""
    section = Section(
        "Reward against KL",
        text="Best of n has KL log n - (n - 1)/n. Where the proxy still rises and the rule falls, the proxy is overoptimised.",
    )
    proxy = {run.name: _path(run) for run in training}
    first = next((run for run in policies if run.scores), None)
    if first is not None:
        scores, golds = first.scores, first.golds()
        name = f"best of n of {first.name}"
        if len(best_of_n(scores)) > 1:
            proxy[name] = _best(scores, scores)
            if golds:
                gold = {f"{name}, by the rule": _best(scores, golds), f"{name}, by the proxy": _best(scores, scores)}
                chart = point_chart("Gold against proxy", "score", "KL, nats", gold, from_zero=True)
                section.charts.append(chart)
    both = [run for run in policies if run.scores and run.golds()]
    if len(both) > 1:
        lines = {run.name: [_both(run)] for run in both}
        section.charts.append(point_chart("Rule against reward model", "rule's score", "reward model's score", lines))
    if any(proxy.values()):
        chart = point_chart("Frontier by the reward model", "score", "KL, nats", proxy, from_zero=True)
        section.charts.insert(0, chart)
    return section


def _path(run: Run) -> list[Point]:
    """Up to 40 points of a PPO run."""
    found = [
        Point(record["kl/mean"], record["reward/score_mean"])
        for record in run.metrics
        if record.get("kl/mean") is not None and record.get("reward/score_mean") is not None
    ]
    return found[:: -(-len(found) // 40) or 1]


def _best(scores: Scores, values: Scores) -> list[Point]:
    return [Point(point.kl, point.mean.mean, point.mean.low, point.mean.high) for point in best_of_n(scores, values)]


def _both(run: Run) -> Point:
    gold = means(run.golds())
    return Point(means(run.scores).mean, gold.mean, gold.low, gold.high)


def _samples(policies: Sequence[Run]) -> list[SampleColumn]:
    """One answer of each policy to the same prompts."""
    shared = [{row["prompt"] for row in run.answers} for run in policies if run.answers]
    if not shared:
        return []
    wanted = [row["prompt"] for row in policies[0].answers if all(row["prompt"] in prompts for prompts in shared)]
    prompts = list(dict.fromkeys(wanted))[:SAMPLES]
    columns = []
    for run in policies:
        rows = {row["prompt"]: row for row in reversed(run.answers)}
        kept = ("prompt", "response", "score", "gold", "stopped")
        shown = [{name: rows[p][name] for name in kept if rows[p].get(name) is not None} for p in prompts if p in rows]
        columns.append(sample_column(run.name, shown))
    return columns
