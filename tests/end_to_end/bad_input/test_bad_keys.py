"""Keys, types, values, and numbers that mean nothing: one message before anything is built."""

import pytest
from bad_cases import Case

CASES: dict[str, Case] = {
    # Keys, types and values.
    "unknown_key": Case("sft", ["sft.epoch=3"], [r"sft\.epoch=3", r"did you mean sft\.epochs\?"]),
    "unknown_key_far_from_all": Case("sft", ["+xyzzy=red"], ["no key xyzzy", "--help"]),
    "unknown_nested_key": Case(
        "ppo", ["policy.optimizer.learning_rate=1"], [r"policy\.optimizer\.learning_rate", "lr"]
    ),
    "wrong_type": Case("sft", ["sft.batch_size=many"], [r"sft\.batch_size=many", "Integer", "Sequences per update"]),
    "float_for_int": Case("sft", ["sft.epochs=1.5"], [r"sft\.epochs=1\.5", "Integer"]),
    "wrong_choice": Case("sft", ["precision=fp31"], ["precision=fp31", "fp32", "bf16"]),
    "wrong_boolean": Case("sft", ["parallel.sequence=maybe"], [r"parallel\.sequence=maybe", "bool"]),
    "missing_value": Case("sft", [], [r"data\.tokenizer is not given", "tokenizer folder"], without=["data.tokenizer"]),
    "missing_model_file": Case("sft", ["model=huge"], ["huge", "tiny"], without=["model"]),
    "missing_recipe": Case("sft", ["recipe=instruct_gpt"], ["recipe=instruct_gpt", "recipes for this stage"]),
    "broken_override": Case("sft", ["sft.epochs"], [r"sft\.epochs"]),
    "save_every_in_words": Case(
        "sft", ["run.save_every=often"], [r"run\.save_every=often", "number of steps", "or auto"]
    ),
    "save_every_negative": Case("sft", ["run.save_every=-1"], [r"run\.save_every=-1", "at least 0"]),
    "cluster_unknown": Case("sft", ["run.save_every=auto", "run.cluster=h300"], ["cluster/h300"]),
    # Meaningless numbers, and schedules that do not fit (each range on its own: tests/config/test_ranges.py).
    "no_epochs": Case("sft", ["sft.epochs=0"], [r"sft\.epochs=0 must be at least 1"]),
    "dropout": Case("sft", ["sft.dropout=1.5"], [r"sft\.dropout=1\.5 must be at least 0 and less than 1"]),
    "negative_decay": Case(
        "ppo", ["value.optimizer.weight_decay=-0.1"], [r"value\.optimizer\.weight_decay=-0\.1 must be at least 0"]
    ),
    "warmup_longer_than_the_steps": Case(
        "sft", ["sft.max_steps=4", "sft.warmup_steps=5"], [r"sft\.warmup_steps=5 is longer than the run's 4 steps"]
    ),
    "warmup_longer_than_the_epochs": Case("sft", ["sft.warmup_steps=4"], [r"warmup_steps=4 .* the run's 3 steps"]),
    "reward_warmup_longer_than_the_epochs": Case(
        "reward_model", ["reward_model.warmup_steps=5"], [r"reward_model\.warmup_steps=5 .* the run's 4 steps"]
    ),
    "policy_warmup_longer_than_its_iterations": Case(
        "ppo", ["ppo.critic_warmup_iterations=2"], [r"ppo\.warmup_iterations=2 .* the run's 1 iterations in which"]
    ),
    "critic_warmup_longer_than_the_run": Case(
        "ppo", ["ppo.critic_warmup_iterations=4"], [r"ppo\.critic_warmup_iterations=4 .* the run's 3 iterations"]
    ),
    "cluster_that_is_none": Case("sft", ["run.cluster=h100"], [r"run\.cluster=h100: there is no", "h100_80gb"]),
    "profile_backwards": Case("sft", ["run.profile=12:10"], [r"run\.profile=12:10: the first and the last step"]),
    "empty_text": Case("sft", ["run.wandb_project="], [r"run\.wandb_project= is empty"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, mistake):
    mistake(CASES[name])
