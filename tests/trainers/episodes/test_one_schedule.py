"""PPO and pretraining microbatches of one update share one pipeline schedule: one fill and one drain for each minibatch."""

import pytest
from megatron.core.pipeline_parallel import schedules
from ranks import run_ranks

STAGES = 4
MICROBATCHES = 3 + 3  # of 5 episodes by 2, and of 10 texts by 4


def schedules_of_policy_updates(stage, arguments):
    """For each update of the policy, this stage's forward (F) and backward (B) passes in order, and their lengths."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.ppo import PPOTrainer

    passes, updates = [], []
    forward, backward, update = schedules.forward_step, schedules.backward_step, PPOTrainer._update_policy

    def watched_forward(*args, **kwargs):
        passes.append("F")
        return forward(*args, **kwargs)

    def watched_backward(*args, **kwargs):
        passes.append("B")
        return backward(*args, **kwargs)

    def watched_update(self, minibatch):
        passes.clear()
        result = update(self, minibatch)
        updates.append("".join(passes))
        return result

    schedules.forward_step, schedules.backward_step = watched_forward, watched_backward
    PPOTrainer._update_policy = watched_update
    cli.run_stage(stage, arguments)
    return updates


@pytest.fixture(scope="module")
def stages(recipe):
    arguments = recipe.ppo(
        "one_schedule", recipe.root / "sft", recipe.root / "reward_model", f"parallel.pipeline={STAGES}"
    )
    return run_ranks(
        STAGES,
        schedules_of_policy_updates,
        "ppo",
        [*arguments, "ppo.iterations=1", "ppo.warmup_iterations=1"],
        timeout=200,
    )


@pytest.mark.parametrize("stage", range(STAGES))
def test_one_fill_and_one_drain_for_each_minibatch(stages, stage):
    fill = STAGES - 1 - stage  # microbatches on their way to the stages after this one
    one_schedule = "F" * fill + "FB" * (MICROBATCHES - fill) + "B" * fill
    assert stages[stage] == [one_schedule, one_schedule]
