"""Records are read by one rank, and what all of them must be read for is found out at the first start only."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from recipe import make_data, read_metrics, run_stage

from megatron_rlhf import cli
from megatron_rlhf.config.errors import Interrupted
from megatron_rlhf.data.files.item_store import StoredItems
from megatron_rlhf.monitoring.progress import Reading
from megatron_rlhf.trainers.setup.parts import warn_of_shared_prompts


def test_a_resumed_run_does_not_read_all_records_again(tmp_path, world, monkeypatch):
    recipe, settings = make_data(tmp_path), ("sft.max_steps=4", "data.validation=null")
    cli.run_stage("sft", recipe.sft("sft", *settings, "run.stop_at_step=2"))
    (facts,) = (tmp_path / "sft").glob("cache/demonstrations-*/facts.json")
    assert {"checksum of demonstrations", "longest"} <= set(json.loads(facts.read_text()))

    def refuse(self):
        pytest.fail("all records are read")

    monkeypatch.setattr(StoredItems, "__iter__", refuse)
    cli.run_stage("sft", recipe.sft("sft", *settings, "run.resume=true"))
    assert len((tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()) >= 4


def test_nor_does_one_of_a_reward_model(tmp_path, world, monkeypatch):
    """Its items are a part of those on the disk."""
    recipe, read = make_data(tmp_path), []
    monkeypatch.setattr(Reading, "made", lambda self: read.append(self._description))
    for resumes in (False, True):
        cli.run_stage("sft", recipe.sft("sft", "sft.max_steps=1")) if not resumes else None
        start, settings = recipe.root / "sft/checkpoints/step_1", ("data.validation=null", "reward_model.max_steps=2")
        del read[:]
        cli.run_stage("reward_model", recipe.reward_model("rm", start, *settings, f"run.auto_resume={resumes}"))
        if not resumes:
            assert {"comparisons split", "comparisons checked", "sequences measured"} < set(read)
    assert set(read) == {"comparisons searched for their best"}


def test_all_prompts_are_not_read_to_compare_them_with_none(world):
    def prompts():
        pytest.fail("all records are read")
        yield

    warn_of_shared_prompts(SimpleNamespace(resume_from=None), prompts(), [])


def stopped_while_reading(overrides: list[str]) -> str:
    """The third record that the first rank makes is followed by a signal."""
    made, count = Reading.made, 0

    def made_and_signalled(self: Any) -> None:
        nonlocal count
        made(self)
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    Reading.made = made_and_signalled  # type: ignore[method-assign]
    try:
        run_stage("sft", overrides)
    except Interrupted as reason:
        return str(reason)
    finally:
        Reading.made = made  # type: ignore[method-assign]
    return "ran to its end"


def test_a_run_that_is_asked_to_stop_while_it_reads_stops_at_once_and_begins_anew(tmp_path):
    recipe = make_data(tmp_path)
    overrides = recipe.sft("sft", "sft.max_steps=2", "run.auto_resume=true")
    reasons = run_ranks(2, stopped_while_reading, overrides, timeout=120)
    says = "asked to stop while demonstrations were tokenised: the run had not begun, and nothing is kept"
    assert reasons == [says] * 2
    assert [path for path in Path(tmp_path / "sft").rglob("*") if "demonstrations" in path.name] == []
    run_ranks(2, run_stage, "sft", overrides, timeout=120)
    assert len(read_metrics(tmp_path / "sft")) >= 2
