"""One PPO-ptx iteration of the toy recipe on one GPU, in each precision. Each run is a fresh process, as a user's is."""

import subprocess
import sys
from pathlib import Path

import pytest
from recipe import Recipe, make_data, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def started(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = make_data(tmp_path_factory.mktemp("recipe"))
    run("train_sft", made.sft("sft"))
    run("train_reward_model", made.reward_model("reward_model", made.root / "sft"))
    return made


def iteration(recipe: Recipe, name: str, *settings: str) -> dict[str, float]:
    base = (recipe.root / "sft", recipe.root / "reward_model")
    run("train_ppo", recipe.ppo(name, *base, "ppo.iterations=1", "ppo.warmup_iterations=1", *settings))
    assert (recipe.root / name / "checkpoints" / "latest").is_file()
    (row,) = read_metrics(recipe.root / name)
    return row


@pytest.mark.parametrize(("precision", "gap"), [("fp32", 0.01), ("bf16", 0.2), ("fp16", 0.05)])
def test_an_iteration(started: Recipe, precision: str, gap: float) -> None:
    row = iteration(started, precision, f"precision={precision}")
    assert row["rollout/logprob_gap_max"] < gap
    assert row["ptx/loss"] > 0
    if precision != "fp16":  # whose loss scale may have to be lowered first
        assert row["skipped_updates"] == 0


def test_an_iteration_sampled_by_megatron_cores_engine(started: Recipe) -> None:
    from megatron_rlhf.parallel.accelerators import dynamic_engine_lacks

    if (missing := dynamic_engine_lacks()) is not None:
        pytest.skip(missing)
    own = iteration(started, "engine_native", "precision=bf16")
    row = iteration(started, "engine_megatron", "precision=bf16", "rollout.engine=megatron")
    assert row["rollout/logprob_gap_max"] < 0.2
    # The same random numbers: texts differ where rounding decides between two tokens.
    assert row["rollout/response_length_mean"] == pytest.approx(own["rollout/response_length_mean"], rel=0.5)
    assert row["skipped_updates"] == 0


@pytest.mark.parametrize("recipe_name", ["tensorwise", "delayed"])
def test_an_iteration_in_fp8(started: Recipe, fp8_gpu: None, recipe_name: str) -> None:
    fp8 = ["precision=fp8_hybrid", f"fp8.recipe={recipe_name}", "fp8.gate_max_gap=1"]
    row = iteration(started, recipe_name, *fp8)
    assert row["fp8/active"] == 1.0
    assert row["fp8/logprob_gap_mean"] > 0
    assert row["skipped_updates"] == 0
