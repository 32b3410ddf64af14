"""The files of conf/: shapes of models, and the paper's values in the recipes of every stage."""

import re

import pytest

from megatron_rlhf.compose import CONF, compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.planning.parameters import total_parameters

SCHEMAS = {"sft": SFTConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig}
SIZES = ["1_3b", "6b", "175b"]
# Weights of the published checkpoints, or of the shape where none was published, in billions.
BILLIONS = {
    "gpt3_125m": 0.125,
    "gpt3_350m": 0.356,
    "gpt3_760m": 0.760,
    "gpt3_1_3b": 1.316,
    "gpt3_2_7b": 2.651,
    "gpt3_6_7b": 6.658,
    "gpt3_6b": 6.658,
    "gpt3_13b": 12.85,
    "gpt3_175b": 174.6,
    "llama2_7b": 6.738,
    "llama3_8b": 8.030,
    "llama3_70b": 70.55,
}


def composed(stage: str, *overrides: str):
    return compose_config(stage, SCHEMAS[stage], list(overrides), missing="-")[0]


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_models_have_the_size_of_their_name(name: str, billions: float) -> None:
    assert total_parameters(composed("sft", f"model={name}").model) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_model_of_the_folder_is_measured() -> None:
    assert {path.stem for path in (CONF / "model").glob("[gl]*_*.yaml")} == set(BILLIONS)


@pytest.mark.parametrize(
    ("size", "lr", "batch", "initialisation_lr"),
    [("1_3b", 9.65e-6, 32, 5e-6), ("6b", 9.65e-6, 32, 1.04e-5), ("175b", 5.03e-6, 8, 2.45e-6)],
)
def test_sft_is_the_papers(size: str, lr: float, batch: int, initialisation_lr: float) -> None:
    config = composed("sft", f"recipe=instructgpt_{size}")
    assert (config.policy.optimizer.lr, config.sft.batch_size, config.sft.epochs) == (lr, batch, 16)
    assert (config.sft.dropout, config.sft.final_lr_fraction, config.sft.warmup_steps) == (0.2, 0.1, 0)
    assert config.data.pretraining_mix == 0
    start = composed("sft", f"recipe=instructgpt_{size}/ppo_initialization")
    assert (start.policy.optimizer.lr, start.sft.batch_size, start.sft.epochs) == (initialisation_lr, batch, 2)
    assert start.data.pretraining_mix == 0.1
    assert start.model == config.model


@pytest.mark.parametrize("size", SIZES)
def test_the_reward_model_is_the_papers(size: str) -> None:
    config = composed("reward_model", f"recipe=instructgpt_{size}")
    assert (config.model.num_layers, config.model.hidden_size) == (32, 4096)
    assert (config.reward.optimizer.lr, config.reward_model.batch_size, config.reward_model.epochs) == (9e-6, 64, 1)


@pytest.mark.parametrize(
    ("size", "hidden", "value_lr"), [("1_3b", 2048, 9e-6), ("6b", 4096, 9e-6), ("175b", 12288, 5e-6)]
)
def test_ppo_is_the_papers(size: str, hidden: int, value_lr: float) -> None:
    config = composed("ppo", f"recipe=instructgpt_{size}")
    ppo = config.ppo
    assert (config.model.hidden_size, config.critic_model.hidden_size) == (hidden, 4096)
    assert config.value.optimizer.lr == value_lr
    assert 2.55e-6 <= config.policy.optimizer.lr <= 2.55e-5  # the range of the paper's sweep
    assert (ppo.batch_size * ppo.iterations, ppo.minibatch_size, ppo.inner_epochs) == (256_000, 64, 1)
    assert (ppo.kl_coef, ppo.clip, ppo.ptx_coef, ppo.ptx_ratio, ppo.ema_decay) == (0.02, 0.2, 27.8, 8, 0.992)
    assert (config.data.pretraining.sequence_length, config.rollout.max_response_tokens) == (2048, 1024)
    assert (ppo.warmup_iterations, config.rollout.temperature) == (10, 1.0)


PRINTED = {
    "sft": "precision max_prompt_tokens max_response_tokens betas epochs dropout final_lr_fraction warmup_steps select_by",
    "ppo_initialization": "sequence_length epochs",
    "reward_model": "precision max_prompt_tokens max_response_tokens lr betas epochs batch_size final_lr_fraction",
    "ppo": """precision max_prompt_tokens max_per_user sequence_length betas temperature max_response_tokens iterations
        batch_size minibatch_size inner_epochs clip gamma kl_coef kl_control ptx_coef ptx_ratio warmup_iterations""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_the_paper_does_not_print_says_so(name: str) -> None:
    """Every value of the recipes is either the paper's, listed here, or labelled; so are the settings common to all PPO runs."""
    lines = (CONF / "recipe" / "instructgpt" / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r" *\w+: [^#\s]", line)]
    unlabelled = {line.split(":")[0].strip() for line in values if "ours" not in line}
    assert unlabelled == set(PRINTED[name].split())
    if name == "ppo":
        labelled = {line.split(":")[0].strip() for line in values} - unlabelled
        assert {"missing_stop_penalty", "whiten_advantages", "ema_decay", "lam", "value_clip"} <= labelled


@pytest.mark.parametrize("stage", SCHEMAS)
@pytest.mark.parametrize("size", SIZES)
def test_adam_is_the_papers(stage: str, size: str) -> None:
    config = composed(stage, f"recipe=instructgpt_{size}")
    optimizers = [
        role.optimizer
        for name in ("policy", "reward", "value")
        if hasattr(role := getattr(config, name, None), "optimizer")
    ]
    assert optimizers
    assert all(tuple(optimizer.betas) == (0.9, 0.95) for optimizer in optimizers)


def test_the_command_line_wins_over_the_recipe() -> None:
    config = composed("ppo", "recipe=instructgpt_175b", "model=llama3_8b", "ppo.kl_coef=0.05", "parallel.pipeline=1")
    assert (config.model.vocab_size, config.ppo.kl_coef, config.parallel.pipeline) == (128256, 0.05, 1)
    assert config.critic_model.vocab_size == 50257
    assert composed("ppo", "recipe=instructgpt_175b", "model=null").model is None
    assert composed("ppo", "recipe=null", "model@critic_model=gpt3_6b").critic_model.hidden_size == 4096


def test_a_recipe_without_the_stage_is_named() -> None:
    with pytest.raises(
        UserError, match=r"recipe=gpt5: there is no conf/recipe/gpt5/ppo\.yaml; recipes .*instructgpt_175b"
    ):
        composed("ppo", "recipe=gpt5")
