"""Settings of the three runs: nothing that changes a figure is at its default (checked by test_reference_settings.py)."""

from pathlib import Path

from reference.data import Settings
from reference.world import World


def sft(world: World, folder: Path) -> Settings:
    return {
        "run.dir": str(folder),
        "run.seed": 77,
        "policy.init_from": str(world.policy),
        **_optimizer("policy", lr=4e-3, betas=(0.8, 0.97), weight_decay=0.2, clip_norm=2.6),
        "reward.init_from": str(world.reward),
        "data.tokenizer": str(world.tokenizer),
        "data.demonstrations": str(world.data("demonstrations")),
        "data.validation": str(world.data("held_out")),
        "data.columns.prompt": "{ask}",
        "data.columns.response": "{answer}",
        **_limits(),
        **_text(world),
        "data.pretraining_mix": 0.3,
        "sft.epochs": 3,
        "sft.batch_size": 5,
        "sft.micro_batch_size": 2,
        "sft.dropout": 0.0,
        "sft.final_lr_fraction": 0.25,
        "sft.warmup_steps": 2,
        "sft.select_by": "reward_model",
        "sft.selection_samples": 3,
        **_sampling("sampling", temperature=0.7, top_k=9, top_p=0.9, longest=7, shortest=3),
    }


def reward_model(world: World, folder: Path) -> Settings:
    return {
        "run.dir": str(folder),
        "run.seed": 81,
        "reward.init_from": str(world.language),
        **_optimizer("reward", lr=5e-3, betas=(0.85, 0.9), weight_decay=0.3, clip_norm=1.8),
        "data.tokenizer": str(world.tokenizer),
        "data.comparisons": str(world.data("comparisons")),
        "data.demonstrations": str(world.data("targets")),
        "data.demonstration_columns.prompt": "{ask}",
        "data.demonstration_columns.response": "{answer}",
        "data.validation_fraction": 0.35,
        **_limits(),
        "reward_model.epochs": 2,
        "reward_model.batch_size": 3,
        "reward_model.micro_batch_size": 2,
        "reward_model.max_completions": 3,
        "reward_model.final_lr_fraction": 0.3,
        "reward_model.warmup_steps": 1,
        "reward_model.validate_every": 2,
    }


def ppo(world: World, folder: Path) -> Settings:
    return {
        "run.dir": str(folder),
        "run.seed": 82,
        "policy.init_from": str(world.policy),
        "reward.init_from": str(world.reward),
        "value.init_from": str(world.value),
        **_optimizer("policy", lr=2e-3, betas=(0.85, 0.98), weight_decay=0.2, clip_norm=5.0),
        **_optimizer("value", lr=8e-3, betas=(0.8, 0.9), weight_decay=0.3, clip_norm=0.18),
        "data.tokenizer": str(world.tokenizer),
        "data.prompts": str(world.data("prompts")),
        "data.columns.prompt": "{ask}",
        "data.columns.user": "{who}",
        "data.max_prompt_tokens": 9,
        "data.max_per_user": 2,
        **_text(world),
        "data.pretraining.held_out_samples": 2,
        **_sampling("rollout", temperature=0.8, top_k=19, top_p=0.95, longest=9, shortest=2),
        "ppo.iterations": 5,
        "ppo.batch_size": 6,
        "ppo.minibatch_size": 3,
        "ppo.inner_epochs": 2,
        "ppo.micro_batch_size": 2,
        "ppo.clip": 0.1,
        "ppo.value_clip": 0.06,
        "ppo.gamma": 0.97,
        "ppo.lam": 0.9,
        "ppo.advantages": "gae",  # the default, with one sample a prompt; other cases have the other estimators
        "ppo.samples_per_prompt": 1,
        "ppo.entropy_coef": 0.04,
        "ppo.kl_coef": 0.05,
        "ppo.kl_control": "adaptive",
        "ppo.kl_target": 0.34,
        "ppo.kl_horizon": 50,
        "ppo.ptx_coef": 3.0,
        "ppo.ptx_gradient_ratio": 0.7,
        "ppo.gradient_report_every": 2,
        "ppo.ptx_ratio": 2,
        "ppo.ptx_micro_batch_size": 5,
        "ppo.warmup_iterations": 2,
        "ppo.critic_warmup_iterations": 1,
        "ppo.ema_decay": 0.9,
        "ppo.missing_stop_penalty": 0.7,
        "ppo.whiten_advantages": True,
        "ppo.old_logprobs": "sampled",
        "ppo.recheck_every": 2,
        "ppo.tax_every": 3,
    }


def _optimizer(role: str, **values: object) -> Settings:
    """Epsilon is well above the rounding of gradients; see comparing.py."""
    return {f"{role}.optimizer.{name}": value for name, value in {"epsilon": 1e-3, **values}.items()}


def _limits() -> Settings:
    return {"data.max_prompt_tokens": 9, "data.max_response_tokens": 8}


def _text(world: World) -> Settings:
    return {
        "data.pretraining.source": str(world.data("text")),
        "data.pretraining.sequence_length": 11,
        "data.pretraining.held_out": 0.2,
    }


def _sampling(group: str, temperature: float, top_k: int, top_p: float, longest: int, shortest: int) -> Settings:
    return {
        f"{group}.temperature": temperature,
        f"{group}.top_k": top_k,
        f"{group}.top_p": top_p,
        f"{group}.max_response_tokens": longest,
        f"{group}.min_response_tokens": shortest,
        f"{group}.batch_size": 2,
        "data.stop": ("<unk>", "old new", "fast"),
    }
