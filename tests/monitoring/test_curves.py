"""The numbers behind the charts."""

import math
import random

import pytest

from megatron_rlhf.monitoring.charts import BOTTOM, TOP, Axis, panel_chart, step_axis, time_chart
from megatron_rlhf.monitoring.curves import (
    MAX_POINTS,
    curve,
    format_measured,
    format_ticks,
    format_value,
    is_noisy,
    log_ticks,
    smooth,
    thin,
    ticks,
)
from megatron_rlhf.monitoring.panels import GROUPS, HEADLINES, Panel, groups_for, panel_of


def test_curve_tells_absent_from_not_finite() -> None:
    records: list[dict] = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": 2.0}]
    found = curve(records, "a", scale=10)
    assert (found.steps, found.values, found.not_finite) == ([1, 4], [10.0, 20.0], [3])
    assert not curve(records, "b")


def test_smoothing_keeps_a_straight_line_to_its_ends() -> None:
    line = [0.5 * i - 3 for i in range(200)]
    assert smooth(line) == pytest.approx(line)


def test_smoothing_removes_most_of_the_noise_and_no_trend() -> None:
    noise = random.Random(0)
    trend = [math.tanh(i / 150) for i in range(500)]
    smoothed = smooth([value + noise.gauss(0, 0.2) for value in trend])
    assert max(abs(a - b) for a, b in zip(smoothed, trend, strict=True)) < 0.2


def test_only_noise_is_smoothed() -> None:
    noise = random.Random(0)
    assert is_noisy([noise.random() for _ in range(100)])
    assert not is_noisy([math.cos(i / 30) for i in range(100)])
    assert not is_noisy([0.02] * 100)
    assert not is_noisy([noise.random() for _ in range(10)])


def test_thinning_keeps_spikes_and_both_ends() -> None:
    values = [math.sin(i / 500) for i in range(20_000)]
    values[7001], values[9001] = 50.0, -50.0
    kept = thin(values)
    assert {0, 7001, 9001, 19_999} <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= MAX_POINTS + 2
    assert thin([1.0, 2.0]) == [0, 1]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.9997, 1.0004, ["0.9998", "1.0000", "1.0002", "1.0004"]),
        (-1.2, 2.1, ["-1", "0", "1", "2"]),
        (0, 9.1e-6, ["0", "2e-6", "4e-6", "6e-6", "8e-6"]),
        (0, 21_000, ["0", "5k", "10k", "15k", "20k"]),
        (0, 3.4e14, ["0", "100T", "200T", "300T"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, labels: list[str]) -> None:
    assert format_ticks(ticks(low, high, 4)) == labels


def test_log_ticks() -> None:
    assert log_ticks(0.4, 30) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(1e-8, 1e-2) == pytest.approx([1e-8, 1e-6, 1e-4, 1e-2])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (0.53124, "0.5312"),
        (-0.5, "-0.5"),
        (1309.6, "1310"),
        (9999.96, "10000"),
        (12_345, "12.35k"),
        (46_080_000, "46.08M"),
        (2.5e-6, "2.5e-6"),
        (100.0, "100"),
        (math.nan, "nan"),
    ],
)
def test_values_as_people_write_them(value: float, text: str) -> None:
    assert format_value(value) == text


def test_standard_errors_decide_the_decimals() -> None:
    assert format_measured(0.72412, 0.00421) == "0.7241 ± 0.0042"
    assert format_measured(72.4, 12.0) == "72 ± 12"
    assert format_measured(0.5, math.nan) == "0.500 ± nan"
    assert format_measured(0.5, 0.0) == "0.500 ± 0.000"


def test_an_axis_is_logarithmic_only_where_it_can_be() -> None:
    panel = Panel("norm", "", {}, logarithmic=True)
    axis = Axis.around([0.01, 100.0], BOTTOM, TOP, panel)
    assert axis.logarithmic
    assert axis(1.0) == pytest.approx((BOTTOM + TOP) / 2, abs=0.1)
    assert not Axis.around([0.0, 100.0], BOTTOM, TOP, panel).logarithmic
    assert not Axis.around([2.0, 3.0], BOTTOM, TOP, panel).logarithmic


def test_rounding_is_not_magnified() -> None:
    axis = Axis.around([0.1 + 0.2, 0.3], BOTTOM, TOP, Panel("", "", {}))
    assert axis(0.3) == axis(0.1 + 0.2)


@pytest.mark.parametrize("steps", [[3], [3, 4], [1, 2, 3, 4], list(range(1, 9))])
def test_steps_are_counted_in_whole_numbers(steps: list[int]) -> None:
    records = [{"step": step, "kl/mean": float(step)} for step in steps]
    chart = panel_chart(panel_of("kl/mean"), step_axis(records), records)
    labels = [label for _, label in chart.x_ticks]
    assert labels
    assert all(label.isdigit() for label in labels)


def test_a_band_is_drawn_only_if_it_was_logged() -> None:
    panel = next(panel for panel in GROUPS[0].panels if panel.band)
    records = [{"step": step, "reward/score_mean": 1.0} for step in (1, 2)]
    assert not panel_chart(panel, step_axis(records), records).has_band
    records = [{**record, "reward/score_std": 0.5} for record in records]
    assert panel_chart(panel, step_axis(records), records).has_band


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-9])
def test_a_constant_is_drawn_inside_the_frame(value: float) -> None:
    axis = Axis.around([value, value], BOTTOM, TOP, Panel("", "", {}))
    assert TOP < axis(value) < BOTTOM
    assert axis.ticks(4)


def test_time_beyond_the_phases_is_other() -> None:
    records = [{"step": step, "time/a_s": 1.0, "time/b_s": 2.0, "time/step_s": 4.0} for step in (1, 2)]
    chart = time_chart(step_axis(records), records)
    assert chart is not None
    assert [(line.label, line.last) for line in chart.lines] == [("a", "25%"), ("b", "50%"), ("other", "25%")]


def test_phases_that_fill_the_step_leave_no_other() -> None:
    records = [{"step": 1, "time/a_s": 4.0, "time/step_s": 4.0}]
    chart = time_chart(step_axis(records), records)
    assert chart is not None
    assert [line.label for line in chart.lines] == ["a"]


def test_every_metric_has_one_panel_and_strangers_are_drawn_last() -> None:
    names = [name for group in GROUPS for panel in group.panels for name in panel.metrics]
    assert len(names) == len(set(names))
    assert set(HEADLINES) <= set(names)
    groups = groups_for(["step", "sft/loss", "mine/own", "time/rollout_s", "reward/score_std"])
    assert [(group.title, [panel.title for panel in group.panels]) for group in groups] == [
        ("Losses", ["SFT loss"]),
        ("Other", ["mine/own"]),
    ]


def test_a_metric_alone_keeps_its_label_in_the_title() -> None:
    assert panel_of("sft/validation_loss").title == "SFT loss, validation"
    assert panel_of("kl/coef").title == "KL coefficient"
