"""Checkpoints and run folders that are not what a stage needs, or that hold another run."""

import pytest
from bad_cases import Case

CASES: dict[str, Case] = {
    "no_such_checkpoint": Case("ppo", ["policy.init_from={folder}/nothing"], [r"policy\.init_from=.*nothing: no such"]),
    "no_checkpoint": Case("ppo", ["reward.init_from={folder}"], [r"reward\.init_from=.* neither a checkpoint"]),
    "reward_model_for_policy": Case(
        "ppo", ["policy.init_from={recipe}/reward_model"], [r"policy\.init_from", "holds reward; needed is policy"]
    ),
    "language_model_for_reward_model": Case(
        "ppo", ["reward.init_from={recipe}/sft"], [r"reward\.init_from=.*sft: .*holds policy; needed is reward"]
    ),
    "language_model_judges_an_evaluation": Case(
        "evaluate", ["reward.init_from={recipe}/sft"], [r"reward\.init_from=.*holds policy; needed is reward"]
    ),
    "language_model_chooses_the_best": Case(
        "sft",
        ["sft.select_by=reward_model", "reward.init_from={recipe}/sft", "sampling.max_response_tokens=8"],
        [r"reward\.init_from=.*holds policy; needed is reward"],
    ),
    "reward_model_to_evaluate": Case(
        "evaluate", ["policy.init_from={recipe}/reward_model"], [r"policy\.init_from=.*holds reward; needed is policy"]
    ),
    "checkpoint_of_another_shape": Case(
        "sft",
        ["policy.init_from={recipe}/sft", "model.hidden_size=64"],
        ["hidden_size 64 against 32", "Leave model out"],
    ),
    "no_average_to_evaluate": Case("evaluate", ["evaluate.ema=true"], ["policy_ema", r"policy\.init_from"]),
    "unwritable_folder": Case(
        "sft", ["run.dir={recipe}/text.txt/run"], [r"run\.dir=.*text\.txt/run cannot be written"]
    ),
    "folder_of_another_run": Case(
        "sft", ["run.dir={recipe}/sft"], [r"run\.dir=.*sft holds another run", r"run\.resume"]
    ),
    "folder_of_another_stage": Case(
        "ppo",
        ["run.dir={recipe}/sft"],
        [r"run\.dir=.*sft holds supervised fine-tuning, and this is PPO: choose another"],
    ),
    "resume_of_another_stage": Case(
        "reward_model",
        ["run.dir={recipe}/sft", "run.resume=true"],
        ["sft holds supervised fine-tuning, and this is the training of a reward model: choose another folder"],
    ),
    "nothing_to_resume": Case("sft", ["run.resume=true"], [r"run\.resume=true", "no checkpoint to go on from"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, mistake):
    mistake(CASES[name])
