"""What may change at resume: every key of every stage has a rule, and each rule does what it says."""

import dataclasses
from pathlib import Path

import pytest

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import keys as keys_of
from megatron_rlhf.config.stages import PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.runs.resume_table import TABLE, Change, compare, compare_content, flat, rule, settings

SCHEMAS = {"sft": SFTConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig}
# The unit that each stage's checkpoints count in: a mistake here trains another model than the log says.
COUNTED_IN = {"sft": "sft.batch_size", "reward_model": "reward_model.batch_size", "ppo": "ppo.batch_size"}


def leaves(stage: str) -> list[str]:
    paths = list(keys_of(SCHEMAS[stage]))
    return [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]


@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_key_has_a_rule_and_every_rule_a_key(stage):
    """A new key needs a rule."""
    missing = []
    for key in leaves(stage):
        try:
            rule(stage, key)
        except StopIteration:
            missing.append(key)
    assert not missing, f"say in runs/resume_table.py what becomes of these keys at resume: {missing}"
    keys = [*keys_of(SCHEMAS[stage])]
    assert not [entry for entry in TABLE[stage] if entry not in keys], "rules of keys that there are no more"


@pytest.mark.parametrize("stage", SCHEMAS)
def test_what_the_checkpoint_counts_in_is_refused(stage):
    for key in (COUNTED_IN[stage], "run.seed", "precision", "parallel.distributed_optimizer"):
        assert rule(stage, key) is Change.refused, key
    role = {"sft": "policy", "reward_model": "reward", "ppo": "value"}[stage]
    for key in ("lr", "betas", "epsilon", "weight_decay", "clip_norm"):
        assert rule(stage, f"{role}.optimizer.{key}") is Change.taken, key


def composed(*overrides: str) -> SFTConfig:
    return compose_config("sft", SFTConfig, list(overrides), missing="-")[0]


def test_settings_are_what_is_taken_or_refused():
    kept = settings("sft", composed("sft.batch_size=4", "run.save_every=7"))
    assert kept["sft.batch_size"] == 4
    assert kept["policy.optimizer.betas"] == [0.9, 0.95]
    assert kept["precision"] == "fp32"
    assert not {"run.dir", "run.save_every", "sft.micro_batch_size", "data.demonstrations"} & set(kept)


def test_a_refused_key_is_named_with_both_values_and_a_taken_one_is_logged(tmp_path):
    before = settings("sft", composed("sft.batch_size=4"))
    same = compare("sft", before, dict(before), tmp_path)
    assert same == []
    now = settings("sft", composed("sft.batch_size=4", "policy.optimizer.betas=[0.8,0.9]", "sft.max_steps=9"))
    taken = compare("sft", before, now, tmp_path)
    assert sorted(taken) == [
        "from here on policy.optimizer.betas=[0.8, 0.9] (was [0.9, 0.95])",
        "from here on sft.max_steps=9 (was null)",
    ]
    now = settings("sft", composed("sft.batch_size=8", "run.seed=5"))
    with pytest.raises(UserError, match=r"run\.seed=5, was 1234; sft\.batch_size=8, was 4: .*step_3 cannot be resumed"):
        compare("sft", before, now, Path("step_3"))


def test_the_coefficient_of_adaptive_control_is_in_the_checkpoint(tmp_path):
    def kept(control: str, coefficient: float) -> dict:
        overrides = [f"ppo.kl_control={control}", f"ppo.kl_coef={coefficient}"]
        return settings("ppo", compose_config("ppo", PPOConfig, overrides, missing="-")[0])

    assert compare("ppo", kept("fixed", 0.1), kept("fixed", 0.2), tmp_path) == [
        "from here on ppo.kl_coef=0.2 (was 0.1)"
    ]
    with pytest.raises(UserError, match=r"ppo\.kl_coef=0\.2, was 0\.1"):
        compare("ppo", kept("adaptive", 0.1), kept("adaptive", 0.2), tmp_path)


def test_a_length_that_follows_the_model_is_compared_when_it_is_known(tmp_path):
    given = settings("sft", composed("sampling.max_response_tokens=12"))
    following = settings("sft", composed())
    assert compare("sft", given, following, tmp_path) == []  # at first: nobody knows it
    with pytest.raises(UserError, match=r"sampling\.max_response_tokens=32, was 12"):
        compare("sft", given, {"sampling.max_response_tokens": 32}, tmp_path)
    with pytest.raises(UserError, match=r"sampling\.max_response_tokens=12, was 32"):
        compare("sft", {**following, "sampling.max_response_tokens": 32}, given, tmp_path)


def test_other_content_is_named_by_what_differs(tmp_path):
    compare_content("prompts", ["data.prompts"], {"pieces": 3}, {"pieces": 3}, tmp_path)
    with pytest.raises(
        UserError, match=r"data\.prompts: .* with other prompts \(pieces 4, was 3\); resume with the same"
    ):
        compare_content(
            "prompts", ["data.prompts"], {"pieces": 3, "checksum": "a"}, {"pieces": 4, "checksum": "a"}, tmp_path
        )


def test_flat_names_every_leaf():
    config = composed("model=tiny")
    assert {key for key in flat(config) if key.startswith("model.")} == {
        f"model.{field.name}" for field in dataclasses.fields(config.model)
    }
