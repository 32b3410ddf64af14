"""Killed at a random moment and started again: the same bytes at the end. `python tests/kill_bench.py` kills more often."""

import random

import pytest
from kill_bench import Stage, Trial, kill_once

KILLS = {"sft": [0, 1], "reward_model": [1], "ppo": [0]}


@pytest.mark.parametrize("name", [pytest.param("sft", marks=pytest.mark.slow), "reward_model", "ppo"])
def test_a_killed_run_ends_with_the_same_bytes(recipe, name):
    stage = Stage(name, recipe, ranks=2)
    reference = f"killed_{name}_undisturbed"
    length = stage.finish(reference)
    draw, trial, attempt = random.Random(len(name)), None, 0
    while trial is None:  # the run may have finished before
        trial = kill_once(stage, f"killed_{name}_{attempt}", reference, KILLS[name], draw.uniform(0, length / 2))
        attempt += 1
    assert trial.passed, trial.row()


def test_a_difference_would_show(recipe):
    """Another seed, and so other bytes in metrics, samples and checkpoint."""
    for run, seed in (("seed_1", 1), ("seed_2", 2)):
        Stage("reward_model", recipe, ranks=1, more=(f"run.seed={seed}", "reward_model.epochs=1")).finish(run)
    differences = Stage("reward_model", recipe, ranks=1).differences("seed_1", "seed_2")
    assert differences == ["metrics", "checkpoint"]
    assert not Trial("reward_model", "rank 0", "", 0.0, 0, "", differences).passed
    assert not Trial("reward_model", "rank 0", "", 0.0, 1, "", []).passed
