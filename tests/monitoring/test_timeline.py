"""Phases of a step, by side: what is kept of them, and the bars drawn."""

import json
import re

import pytest

from megatron_rlhf.monitoring.progress import PhaseTimer
from megatron_rlhf.monitoring.report import write_report
from megatron_rlhf.monitoring.timeline import draw, merged, together


def test_a_timer_knows_when_the_phases_of_a_step_were():
    clock = iter(range(100))
    timer = PhaseTimer()
    timer._now = lambda: float(next(clock))  # type: ignore[method-assign]
    with timer("step"):  # 0
        with timer("rollout"), timer("inside"):  # 1, and inside from 2 to 3
            pass
        with timer("scoring"):  # 5 to 6
            pass
    with timer("evaluation"), timer("scoring"):
        pass
    assert timer.take_spans() == [("rollout", 1.0, 4.0), ("scoring", 5.0, 6.0)]
    assert timer.take_spans() == []


def test_short_phases_and_waiting_are_left_out_and_neighbours_joined():
    spans = [("waiting", 0, 1), ("scoring", 1, 2), ("value", 2, 2.001), ("scoring", 2.002, 3), ("scoring", 4, 5)]
    assert merged(spans, seconds=10) == [("scoring", 1, 3), ("scoring", 4, 5)]


def test_seconds_that_two_sides_share():
    assert together([("rollout", 0, 5)], [("scoring", 1, 2), ("scoring", 4, 7)]) == pytest.approx(2)
    assert together([("rollout", 0, 1)], [("scoring", 1, 2)]) == 0


def test_bars_are_where_the_phases_were():
    timeline = draw(3, {"policy": [("rollout", 0.0, 5.0), ("update", 6.0, 10.0)], "critic": [("rollout", 5.0, 10.0)]})
    policy, critic = timeline.bars
    assert timeline.phases == ["rollout", "update"] and "step 3" in timeline.title
    first, second = policy.blocks
    scale = first.width / 5
    assert second.x - first.x == pytest.approx(6 * scale, abs=0.2)
    assert second.width == pytest.approx(4 * scale, abs=0.2)
    assert critic.blocks[0].x == pytest.approx(first.x + first.width, abs=0.2)
    assert critic.blocks[0].colour == first.colour != second.colour
    assert "update 6 to 10 s" in policy.summary


def test_the_report_shows_the_last_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 2.0}\n{"step": 2, "time/step_s": 2.0}\n')
    lines = [{"step": step, "sides": {"a side": [["rollout", 0, step]]}} for step in (1, 2)]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "Who did what in step 2" in page and "a side" in page
    assert len(re.findall(r"<rect ", page)) == 1
