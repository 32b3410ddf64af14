"""Records are read by one rank, and what all of them must be read for is found out at the first start only."""

import json

import pytest
from recipe import make_data

from megatron_rlhf import cli
from megatron_rlhf.data.files.item_store import StoredItems


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
