"""Old values that the value model's first update finds: the run is that of a scoring pass for them, up to rounding."""

import dataclasses

import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close
from update_losses import config

from megatron_rlhf.config.lora import LoraConfig
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.placement import PlacementConfig, PlacementKind
from megatron_rlhf.config.training import AdvantageEstimator

ONE_MINIBATCH = ("ppo.minibatch_size=10", "ppo.inner_epochs=2", "ppo.iterations=2", "ppo.warmup_iterations=1")
PACKED = ("ppo.micro_batch_size=null", "ppo.micro_batch_tokens=64")


def both(setting):
    return f"parallel.{setting}", f"critic_parallel.{setting}"


LAYOUTS = {
    "one rank": (1, ()),
    "dp2": (2, ("ppo.micro_batch_size=3",)),
    "pp2": (2, both("pipeline=2")),
    "cp2": (2, both("context=2")),
    "dp2_pp2, packed": (4, (*both("pipeline=2"), *PACKED)),
    "tp2_sp, packed": (2, (*both("tensor=2"), *both("sequence=true"), *PACKED)),
}


def run(recipe, name, *more, ranks=1, function=run_stage):
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *more)
    return run_ranks(ranks, function, "ppo", arguments, timeout=400), read_metrics(recipe.root / name)


def scored_before(stage, arguments):
    """The same with a scoring pass for the old values."""
    from megatron_rlhf.config.stages import PPOConfig

    PPOConfig.values_in_update = property(lambda self: False)
    return run_stage(stage, arguments)


@pytest.fixture(scope="module")
def before(recipe):
    return run(recipe, "values_scored_before", *ONE_MINIBATCH, function=scored_before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_metrics_are_those_of_values_scored_before(layout, before, recipe):
    ranks, more = LAYOUTS[layout]
    results, rows = run(recipe, f"values_in_update_{layout}", *ONE_MINIBATCH, *more, ranks=ranks)
    weights, expected = whole_weights(results), whole_weights(before[0])
    for role in ("policy", "value"):
        assert_close(weights[role], expected[role], relative=1e-4)
    for row, one in zip(rows, before[1], strict=True):
        for name in ("value/loss", "value/explained_variance", "value/clip_fraction", "policy/loss", "kl/mean"):
            assert row[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)


def count_passes(stage, arguments):
    """How often the value model scores."""
    from megatron_rlhf import cli
    from megatron_rlhf.models.roles import Role

    scored, values = [], Role.values

    def watched(self, *args):
        scored.append(self.name)
        return values(self, *args)

    Role.values = watched
    cli.run_stage(stage, arguments)
    return scored.count("value")


def own_estimator(stage, arguments):
    """The same, and the largest values that a function in the place of the estimator gets."""
    from megatron_rlhf.trainers.ppo import PPOTrainer

    seen, run = [], PPOTrainer.run

    def with_own(self):
        estimate = self.estimate_advantages

        def watched(rewards, rollout, config):
            seen.append(float(rollout.values_bt.abs().max()))
            return estimate(rewards, rollout, config)

        self.estimate_advantages = watched
        return run(self)

    PPOTrainer.run = with_own
    return count_passes(stage, arguments), seen


def test_the_value_model_has_no_pass_of_its_own_with_one_minibatch(recipe):
    assert run(recipe, "values_one_minibatch", *ONE_MINIBATCH, function=count_passes)[0] == [0]
    assert run(recipe, "values_two_minibatches", "ppo.iterations=2", function=count_passes)[0] == [2]


def test_an_estimator_of_ones_own_gets_the_values(recipe):
    ((passes, seen),), _ = run(recipe, "values_own", *ONE_MINIBATCH, function=own_estimator)
    assert passes == len(seen) == 2
    assert min(seen) > 0


def one_minibatch(**more):
    whole = config()
    return dataclasses.replace(whole, ppo=dataclasses.replace(whole.ppo, minibatch_size=whole.ppo.batch_size), **more)


def test_when_an_update_can_find_them():
    assert one_minibatch().values_in_update
    assert not config().values_in_update, "later minibatches are read by other weights"
    assert not one_minibatch(precision=Precision.fp8_hybrid).values_in_update, "scales would differ"
    apart = PlacementConfig(kind=PlacementKind.disaggregated, critic_ranks=1)
    assert not one_minibatch(placement=apart).values_in_update, "the policy would wait for the update"
    dropping = dataclasses.replace(config().value, lora=LoraConfig(dropout=0.1))
    assert not one_minibatch(value=dropping).values_in_update, "the update's values are other"
    whole = one_minibatch()
    whole.ppo.advantages = AdvantageEstimator.rloo
    assert not whole.values_in_update, "there is no value model"
