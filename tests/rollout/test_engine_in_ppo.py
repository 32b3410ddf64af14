"""PPO whose responses Megatron-Core's engine samples is PPO: every metric is that of a run with our own engine."""

import dynamic_engine_stand_in as stand_in
import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage

from megatron_rlhf.parallel import compat

pytestmark = pytest.mark.skipif(not compat.DYNAMIC_ENGINE, reason="Megatron-Core before 0.19 has no such engine")
SETTINGS = (
    "ppo.iterations=2",
    "ppo.warmup_iterations=1",
    "evaluation.every=1",
    "evaluation.samples=4",
    "data.part=train",
)


def with_engine(stage, arguments):
    """As on a GPU, but in fp32: the check that would refuse this CPU does not run."""
    from megatron_rlhf.rollout import megatron_engine
    from megatron_rlhf.trainers.setup import machine

    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        patch.setattr(megatron_engine, "BLOCK", 4)
        patch.setattr(machine, "dynamic_engine_lacks", lambda: None)
        patch.setattr(machine.engine_checks, "check_engine", lambda config, missing: None)
        run_stage(stage, arguments)
        return stand_in.Graph.replayed


def test_a_run_has_the_figures_of_our_own_engine(recipe):
    starts = (recipe.root / "sft", recipe.root / "reward_model")
    settings = (*SETTINGS, f"evaluation.prompts={recipe.root}/prompts.jsonl")
    run_ranks(1, run_stage, "ppo", recipe.ppo("engine_native", *starts, *settings), timeout=300)
    chosen = (*settings, "rollout.engine=megatron")
    (replayed,) = run_ranks(1, with_engine, "ppo", recipe.ppo("engine_megatron", *starts, *chosen), timeout=300)
    assert replayed > 0
    expected, rows = (read_metrics(recipe.root / name) for name in ("engine_native", "engine_megatron"))
    assert len(rows) == len(expected) == 2
    for row, other in zip(rows, expected, strict=True):
        assert 0 < row["rollout/logprob_gap_max"] < 1e-5
        for name in set(other) - {"rollout/logprob_gap_max", "rollout/logprob_gap_mean"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name
