"""Old log-probabilities as they were sampled: the run is the same except for rounding, and a pass of the policy is saved."""

import pytest
from ranks import RankFailed, run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close

SAMPLED = ("ppo.old_logprobs=sampled", "ppo.recheck_every=2")
# Of numbers near zero that are differences of larger ones; the explained variance is 1 - a ratio near 1.
ROUNDING = {
    "kl/mean": 2e-5,
    "kl/k3_mean": 2e-5,
    "policy/loss": 2e-6,
    "policy/approx_kl": 1e-6,
    "value/explained_variance": 2e-6,
}
GAPS = ("rollout/logprob_gap_max", "policy/first_ratio_max_gap")
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2_sampled_at_tp2": (2, ["rollout.parallel.tensor=2"]),
    "disaggregated": (2, ["placement=disaggregated", "placement.critic_ranks=1"]),
}


def run(recipe, name, *more, ranks=1, function=run_stage):
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *more)
    results = run_ranks(ranks, function, "ppo", arguments, timeout=400)
    return results, read_metrics(recipe.root / name), (recipe.root / name / "samples.jsonl").read_text()


def count_passes(stage, arguments):
    """How many times each role's log-probabilities were computed while a rollout was collected, by iteration."""
    from megatron_rlhf import cli
    from megatron_rlhf.models.roles import Role
    from megatron_rlhf.trainers import ppo

    passes, collect, logprobs = [], ppo.collect_rollout, Role.logprobs

    def counted(role, *args, **kwargs):
        passes[-1].append(role.name)
        return logprobs(role, *args, **kwargs)

    def watched(*args, **kwargs):
        passes.append([])
        Role.logprobs = counted
        try:
            return collect(*args, **kwargs)
        finally:
            Role.logprobs = logprobs

    ppo.collect_rollout = watched
    cli.run_stage(stage, arguments)
    return passes


@pytest.fixture(scope="module")
def recomputed(recipe):
    return run(recipe, "old_recomputed", "ppo.inner_epochs=2")


@pytest.fixture(scope="module")
def sampled(recipe):
    return run(recipe, "old_sampled", *SAMPLED, "ppo.inner_epochs=2")


def assert_same_figures(rows, expected):
    for row, wanted in zip(rows, expected, strict=True):
        for name in wanted.keys() - {*GAPS}:
            assert row[name] == pytest.approx(wanted[name], rel=2e-5, abs=ROUNDING.get(name, 1e-7)), name
        assert max(row.get(name, 0.0) for name in GAPS) < 1e-5


def test_the_run_is_the_same_but_for_rounding(recomputed, sampled):
    (ranks, rows, samples), (expected_ranks, expected, expected_samples) = sampled, recomputed
    assert_same_figures(rows, expected)
    assert [line.split('"score"')[0] for line in samples.splitlines()] == [
        line.split('"score"')[0] for line in expected_samples.splitlines()
    ]
    for role, weights in whole_weights(expected_ranks).items():
        assert_close(whole_weights(ranks)[role], weights, relative=2e-5)


def test_the_policy_scores_only_the_rollouts_that_are_rechecked(recipe):
    (passes,), rows, _ = run(recipe, "old_counted", *SAMPLED, function=count_passes)
    assert passes == [["reference"], ["reference", "policy"], ["reference"]]
    assert ["rollout/logprob_gap_max" in row for row in rows] == [False, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_other_layouts(layout, recipe, sampled):
    ranks, overrides = LAYOUTS[layout]
    results, rows, _ = run(recipe, f"old_{layout}", *SAMPLED, "ppo.inner_epochs=2", *overrides, ranks=ranks)
    assert_same_figures(rows, sampled[1])
    for role, weights in whole_weights(sampled[0]).items():
        assert_close(whole_weights(results)[role], weights, relative=2e-5)


def test_resumed_equals_uninterrupted(recipe, sampled):
    settings = (*SAMPLED, "ppo.inner_epochs=2", "run.save_every=1")
    run(recipe, "old_resumed", *settings, "run.stop_at_step=1")
    resumed = run(recipe, "old_resumed", *settings, "run.resume=true")
    assert resumed[1:] == sampled[1:]
    for role, weights in whole_weights(sampled[0]).items():
        assert_close(whole_weights(resumed[0])[role], weights, relative=0)


def warm_sampler(stage, arguments):
    """A sampler that reports log-probabilities at another temperature than it should."""
    from megatron_rlhf import cli
    from megatron_rlhf.rollout import runner

    sampler = runner.Sampler
    runner.Sampler = lambda temperature, *rest: sampler(1.3 * temperature, *rest)
    cli.run_stage(stage, arguments)


@pytest.mark.parametrize(
    ("seen_by", "settings", "iteration"),
    [
        ("the first update", ["ppo.recheck_every=9"], 1),
        ("the recheck", ["ppo.recheck_every=2", "ppo.critic_warmup_iterations=2", "ppo.warmup_iterations=0"], 2),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_sampler_that_disagrees_stops_the_run(seen_by, settings, iteration, recipe):
    with pytest.raises(RankFailed, match=rf"RolloutMismatch(?s:.*)at iteration {iteration}, more than"):
        run(recipe, f"old_warm_{iteration}", "ppo.old_logprobs=sampled", *settings, function=warm_sampler)


def sampler_with_an_offset(stage, arguments):
    """A sampler whose log-probabilities are all off by a hundredth, as rounding might have it: less than stops a run."""
    from megatron_rlhf import cli
    from megatron_rlhf.rollout import runner

    class Offset(runner.Sampler):
        def __call__(self, *args, **kwargs):
            tokens, logprobs = super().__call__(*args, **kwargs)
            return tokens, logprobs + 0.01

    runner.Sampler = Offset
    cli.run_stage(stage, arguments)


def test_ratios_start_from_what_was_sampled_where_it_is_rechecked_too(recipe):
    _, rows, _ = run(recipe, "old_offset", *SAMPLED, function=sampler_with_an_offset)
    assert ["rollout/logprob_gap_max" in row for row in rows] == [False, True, False]
    for row in rows:
        assert row["policy/first_ratio_max_gap"] == pytest.approx(0.01, rel=0.1)
