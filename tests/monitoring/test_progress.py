"""Progress lines, the bar on a terminal, and the phase timer, on a clock that the test advances."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from megatron_rlhf.monitoring import progress
from megatron_rlhf.monitoring.progress import PhaseTimer, Progress, Reading


class Clock:
    """Replaces the `time` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="megatron_rlhf"):
        yield caplog


def test_a_fast_run_writes_a_line_for_each_tenth(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=200, description="ppo") as bar:
        for _ in range(200):
            clock.now += 0.01
            bar.advance(reward=0.123456)
    assert len(lines.messages) == 10
    assert lines.messages[0] == "ppo 20/200 (10%) | 0:00:00 elapsed | 0:00:02 left | 0.01 s/step | reward 0.1235"
    assert lines.messages[-1].startswith("ppo 200/200 (100%) | 0:00:02 elapsed | 0:00:00 left")


def test_a_slow_run_writes_a_line_every_ten_seconds(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=100_000) as bar:
        for _ in range(30):
            clock.now += 3
            bar.advance()
    assert [line.split("/")[0] for line in lines.messages] == ["4", "8", "12", "16", "20", "24", "28"]


def test_the_pace_of_a_resumed_run_is_that_of_this_process(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=100, initial=80) as bar:
        clock.now += 60
        bar.advance(10)
    assert lines.messages == ["90/100 (90%) | 0:01:00 elapsed | 0:01:00 left | 6 s/step"]


def test_a_long_file_is_said_to_be_read_every_ten_seconds(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    reading = Reading("prompts tokenised", size=4000)
    for _ in range(25):
        clock.now += 1
        reading.read(100)
        reading.made()
    assert lines.messages == [
        "prompts tokenised: 10 | 25% | 0:00:10 elapsed | 0:00:30 left",
        "prompts tokenised: 20 | 50% | 0:00:20 elapsed | 0:00:20 left",
    ]


def test_so_are_records_of_another_source(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    for count in (4, None):
        reading = Reading("prompts", count=count)
        clock.now += 70
        reading.made()
    assert lines.messages == ["prompts: 1 | 25% | 0:01:10 elapsed | 0:03:30 left", "prompts: 1 | 0:01:10 elapsed"]


def test_disabled_progress_counts_and_says_nothing(lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=3, enabled=False) as bar:
        bar.advance(3)
    assert bar.step == 3
    assert lines.messages == []


def test_a_terminal_gets_a_bar_with_log_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(console)
    try:
        with Progress(total=4, initial=1, description="sft") as bar:
            logging.getLogger("megatron_rlhf").warning("a word in between")
            bar.advance(3, loss=1.5)
    finally:
        logging.getLogger().removeHandler(console)
    shown = terminal.getvalue()
    assert "4/4" in shown
    assert "loss=1.5" in shown
    assert "a word in between\n" in shown


def test_phases_add_up_until_they_are_taken(clock: Clock) -> None:
    timer = PhaseTimer()
    with timer("step"):
        for seconds in (1.0, 2.0):
            with timer("rollout"):
                clock.now += seconds
        with suppress(RuntimeError), timer("policy"):
            clock.now += 4.0
            raise RuntimeError  # time that ended in an error counts, too
    assert timer.take() == {"time/rollout_s": 3.0, "time/policy_s": 4.0, "time/step_s": 7.0}
    assert timer.take() == {}


def test_the_clock_is_read_after_the_device_is_done(clock: Clock) -> None:
    def wait_for_kernels() -> None:
        clock.now += 0.5

    timer = PhaseTimer(synchronize=wait_for_kernels)
    with timer("policy"):
        pass
    assert timer.take() == {"time/policy_s": 0.5}


def test_a_peak_counts_for_every_phase_that_was_open() -> None:
    peaks = iter(
        [1.0, 2.0, 7.0, 3.0, 9.0]
    )  # before "step"; in it before "rollout"; in "rollout"; after it; before "value"
    timer = PhaseTimer(peak_bytes=lambda: next(peaks, 0.5))
    with timer("step"), timer("rollout"):
        pass
    with timer("value"):
        pass
    assert {name: x for name, x in timer.take().items() if name.startswith("memory/")} == {
        "memory/step_peak_bytes": 7.0,
        "memory/rollout_peak_bytes": 7.0,
        "memory/value_peak_bytes": 0.5,
    }


def test_a_long_step_says_how_far_it_is_less_and_less_often(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=500, description="PPO") as bar:
        bar.begin_step({"policy": 4})
        for second in range(0, 100):
            bar.inside("rollout", second, 200)
            clock.now += 1
    assert lines.messages == [
        "PPO step 1: rollout 5% | 0:00:10 elapsed | 0:03:10 left of it",
        "PPO step 1: rollout 15% | 0:00:30 elapsed | 0:02:50 left of it",
        "PPO step 1: rollout 35% | 0:01:10 elapsed | 0:02:10 left of it",
    ]


def test_a_short_step_says_nothing_of_itself(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with Progress(total=500) as bar:
        for _ in range(20):
            bar.begin_step({})
            for second in range(9):
                bar.inside("rollout", second, 9)
                clock.now += 1
    assert lines.messages == []


def test_a_phase_in_parts_counts_its_own_time(clock: Clock) -> None:
    """Four updates of two microbatches of 5 s, each followed by another phase's 100 s: in the third, half is done."""
    phases = progress.Phases({"policy": 4})
    for _ in range(2):
        for done in range(2):
            phases.reached("policy", done, 2)
            clock.now += 5
        phases.reached("value", 0, 1)
        clock.now += 100
    phases.reached("policy", 0, 2)
    # The last microbatch's time of a part is not heard of: 5 s of each of the two.
    assert phases.describe(" ") == "policy 50% 0:03:40 elapsed 0:00:10 left of it"


def test_a_bar_shows_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=500, description="PPO") as bar:
        bar.begin_step({})
        bar.inside("scoring", 0, 4)
        clock.now += 12
        bar.inside("scoring", 1, 4)
        clock.now += 1
        bar.inside("scoring", 2, 4)  # too soon after the last one
    assert "scoring 25% 0:00:12 elapsed 0:00:36 left of it" in terminal.getvalue()
    assert "scoring 50%" not in terminal.getvalue()
