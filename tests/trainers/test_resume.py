"""An interrupted and resumed run has the metrics and weights of an uninterrupted one, bit for bit."""

import json

import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close

DROPOUT = "sft.dropout=0.2"
STAGES = {
    "sft": [
        "sft.epochs=3",
        DROPOUT,
        "sft.warmup_steps=2",
        "policy.optimizer.weight_decay=0.1",
        "data.pretraining_mix=0.3",  # three or four texts in a batch of twelve
    ],
    "reward_model": ["reward_model.epochs=2", "reward_model.validate_every=3"],
    "ppo": [
        "ppo.kl_control=adaptive",
        "ppo.kl_target=0.01",
        "ppo.kl_horizon=30",
        "ppo.iterations=4",
        "ppo.inner_epochs=2",
    ],
}
STOPS = {"sft": 5, "reward_model": 3, "ppo": 2}  # in the middle of an epoch
LAYOUTS = {
    "one_rank": (1, []),
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "dp2_distributed": (2, ["parallel.distributed_optimizer=true"]),
    "disaggregated": (2, ["placement=disaggregated", "placement.critic_ranks=1"]),
}


def arguments(recipe, stage, name, layout, *more):
    layout = list(layout)
    if stage == "ppo":
        layout += [f"critic_{entry}" for entry in layout if entry.startswith("parallel.")]
        return recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *STAGES[stage], *layout, *more)
    if stage == "reward_model":
        return recipe.reward_model(name, recipe.root / "sft", *STAGES[stage], *layout, *more)
    return recipe.sft(name, *STAGES[stage], *layout, *more)


@pytest.mark.parametrize(
    ("stage", "layout"),
    [(stage, "one_rank") for stage in STAGES]
    + [("sft", "tp2"), ("ppo", "tp2"), ("ppo", "dp2_distributed"), ("ppo", "disaggregated")],
)
def test_interrupted_and_resumed_equals_uninterrupted(stage, layout, recipe):
    ranks, overrides = LAYOUTS[layout]
    at = STOPS[stage]

    def run(name, *more):
        # Both save at the same step: a killed run has saved along the way, too.
        every = f"run.save_every={at}"
        return run_ranks(ranks, run_stage, stage, arguments(recipe, stage, name, overrides, every, *more), timeout=400)

    straight = run(f"{stage}_{layout}_straight")
    name = f"{stage}_{layout}_interrupted"
    run(name, f"run.stop_at_step={at}")
    assert [row["step"] for row in read_metrics(recipe.root / name)] == list(range(1, at + 1))
    # What remains of a process that continued after its last checkpoint and was killed while writing.
    with (recipe.root / name / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": at + 1, "sft/loss": 0.0}) + '\n{"step": 99, "half')
    resumed = run(name, "run.resume=true")
    assert read_metrics(recipe.root / name) == read_metrics(recipe.root / f"{stage}_{layout}_straight")
    for role, weights in whole_weights(straight).items():
        assert_close(whole_weights(resumed)[role], weights, relative=0)
    if stage == "ppo":
        samples = [
            (recipe.root / f"ppo_{layout}_{which}" / "samples.jsonl").read_text()
            for which in ("straight", "interrupted")
        ]
        assert samples[0] == samples[1]
        coefficients = {row["kl/coef"] for row in read_metrics(recipe.root / name)}
        assert len(coefficients) == 4, "the KL coefficient moves in this test"


def load_average(arguments):
    from toys import weight_blocks

    from megatron_rlhf import cli

    trainer = cli.run_stage("ppo", arguments)
    weights = weight_blocks(trainer.policy.role)
    with trainer.policy.average.as_weights() as averaged:
        return weight_blocks(averaged), weights


def test_the_moving_average_survives(recipe):
    """It lags far behind the weights, so that restarting it from them would show."""
    from toys import assemble

    settings = ("ppo.ema_decay=0.9", "run.save_every=2")

    def run(name, *more):
        ((average, weights),) = run_ranks(
            1, load_average, arguments(recipe, "ppo", name, [], *settings, *more), timeout=400
        )
        return assemble([average], 301), assemble([weights], 301)

    average, weights = run("ema_straight")
    run("ema_interrupted", "run.stop_at_step=2")
    resumed, _ = run("ema_interrupted", "run.resume=true")
    assert_close(resumed, average, relative=0)
    with pytest.raises(AssertionError):
        assert_close(weights, average, relative=1e-6)


def test_resume_at_another_layout_goes_on_with_the_same_numbers(recipe):
    """From one rank to two and back: equal to the layout matrix's tolerances, not bit for bit."""
    straight = recipe.root / "ppo_moved_straight"
    base = [recipe.root / "sft", recipe.root / "reward_model"]
    run_ranks(1, run_stage, "ppo", recipe.ppo(straight.name, *base, "run.save_every=1"), timeout=400)
    steps = [(1, 1, []), (2, 2, ["parallel.tensor=2", "critic_parallel.pipeline=2"]), (1, 3, [])]
    for ranks, stop, layout in steps:
        more = [*layout, "run.save_every=1", f"run.stop_at_step={stop}", f"run.resume={str(stop > 1).lower()}"]
        run_ranks(ranks, run_stage, "ppo", recipe.ppo("ppo_moved", *base, *more), timeout=400)
    rows, expected = read_metrics(recipe.root / "ppo_moved"), read_metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, reference in zip(rows, expected, strict=True):
        for name in ("reward/score_mean", "ptx/loss", "value/loss", "policy/entropy", "rollout/response_length_mean"):
            assert row[name] == pytest.approx(reference[name], rel=1e-5), name
