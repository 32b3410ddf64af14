"""run.profile: a trace of these steps and no others."""

import json
from pathlib import Path

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.monitoring.progress import PhaseTimer
from megatron_rlhf.runs.profile import Profile, phase_range


def trace(folder: Path, steps: str | None, local_rank: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """File -> the ranges in it, after four steps of two phases."""
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)
    profile, timer = (
        Profile(RunConfig(dir=str(folder), profile=steps).profiled_steps(), folder, rank=3),
        PhaseTimer(mark=phase_range),
    )
    for number in range(1, 5):
        with profile.step(number), timer("step"), timer("rollout" if number < 3 else "policy"):
            pass
    profile.close()
    files = sorted(folder.rglob("*.json"))
    return {
        path.name: {e["name"] for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "user_annotation"}
        for path in files
    }


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("2:3", {"steps_2-3_rank_3.json": {"step 2", "step 3", "step", "rollout", "policy"}}),
        ("1", {"steps_1-1_rank_3.json": {"step 1", "step", "rollout"}}),
        ("4:100", {"steps_4-100_rank_3.json": {"step 4", "step", "policy"}}),  # the run ends before
        ("7:9", {}),
        (None, {}),
    ],
)
def test_the_trace_has_the_steps_and_their_phases(steps, expected, tmp_path, monkeypatch):
    assert trace(tmp_path, steps, "0", monkeypatch) == expected


def test_one_rank_of_a_node_traces(tmp_path, monkeypatch):
    assert trace(tmp_path, "1:2", "1", monkeypatch) == {}


@pytest.mark.parametrize("text", ["", "0:2", "3:2", "a:b", "1:2:3", "1-2"])
def test_nonsense_is_refused(text):
    with pytest.raises(UserError, match=r"run\.profile="):
        RunConfig(dir="run", profile=text).profiled_steps()
