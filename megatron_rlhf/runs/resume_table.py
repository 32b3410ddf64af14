"""What may change when a run is resumed, key by key: applied, or refused by name, never silently ignored.

A checkpoint keeps the settings it was made with. docs/crashes.md has this table in words.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import unnamed


class Change(Enum):
    """What happens to a key whose value differs at resume."""

    free = "free"
    """How the work is done, not what is learned: layouts, sizes of passes, folders. Not compared."""
    taken = "taken"
    """The new value applies from the next step on, and the log says so."""
    refused = "refused"
    """Counters in the checkpoint would change their meaning, or it would be a different run."""
    content = "content"
    """Names of models and data: they may have moved, but their content must be the same (`Session.require_same`)."""


def _keys(change: Change, prefix: str, names: str) -> dict[str, Change]:
    return {f"{prefix}{name}": change for name in names.split()}


def _parallel(prefix: str) -> dict[str, Change]:
    free = (
        "tensor pipeline virtual_stages last_stage_layers context expert sequence recompute overlap_grad_reduce "
        "overlap_param_gather fused_kernels"
    )
    # Megatron-Core's two kinds of optimizer state do not load into each other.
    return _keys(Change.free, prefix, free) | _keys(Change.refused, prefix, "distributed_optimizer")


def _trained(role: str) -> dict[str, Change]:
    return {
        f"{role}.init_from": Change.content,
        **_keys(Change.taken, f"{role}.optimizer.", "lr betas epsilon weight_decay clip_norm"),
        # They decide which weights have an optimizer's state in the checkpoint.
        **_keys(Change.refused, f"{role}.", "lora.rank lora.alpha lora.targets trainable"),
        f"{role}.lora.dropout": Change.taken,
    }


_COMMON = {
    **_keys(
        Change.free,
        "run.",
        "dir resume auto_resume save_every cluster keep_last keep_every async_save stop_at_step export_hf max_skipped_steps "
        "wandb_project wandb_entity wandb_tags mlflow_experiment rendezvous_timeout_s profile",
    ),
    "run.seed": Change.refused,
    "watchdog.timeout_s": Change.free,
    **_parallel("parallel."),
    "precision": Change.refused,
    "fp8.recipe": Change.refused,
    **_keys(Change.taken, "fp8.", "gate_every gate_max_gap"),
    "fp8.gate_samples": Change.refused,
    "model": Change.content,
    "data.tokenizer": Change.content,
    "data.chat_template": Change.content,
    "data.format": Change.content,
    "data.chat": Change.content,
    "data.allow_other_tokenizer": Change.free,
    "data.stop": Change.taken,
}
FOLLOW = ("rollout.max_response_tokens", "sampling.max_response_tokens")
"""Not given, they follow the models: compared when these are known (`Session.settle`)."""
_SAMPLING = "temperature top_k top_p repetition_penalty beams max_response_tokens min_response_tokens"
_PRETRAINING = {
    "data.pretraining.source": Change.content,
    "data.pretraining.columns": Change.content,
    "data.pretraining.sequence_length": Change.refused,
    "data.pretraining.held_out": Change.refused,
    "data.pretraining.held_out_samples": Change.taken,
}

TABLE: dict[str, dict[str, Change]] = {
    "sft": {
        **_COMMON,
        **_PRETRAINING,
        **_keys(Change.content, "data.", "demonstrations validation columns max_prompt_tokens max_response_tokens"),
        "data.assistant_turns": Change.content,
        "data.pretraining_mix": Change.refused,
        **_trained("policy"),
        "reward.init_from": Change.content,
        **_keys(Change.taken, "sft.", "epochs max_steps dropout final_lr_fraction warmup_steps"),
        **_keys(Change.refused, "sft.", "batch_size select_by selection_samples"),
        "sft.logged_samples": Change.taken,
        **_keys(Change.free, "sft.", "micro_batch_size micro_batch_tokens"),
        # They decide which epoch is best: figures from different ways of sampling are not comparable.
        **_keys(Change.refused, "sampling.", f"{_SAMPLING} precision"),
        "sampling.batch_size": Change.free,
    },
    "reward_model": {
        **_COMMON,
        **_keys(Change.content, "data.", "comparisons validation demonstrations max_prompt_tokens max_response_tokens"),
        **_keys(Change.content, "data.", "columns demonstration_columns"),
        "data.validation_fraction": Change.refused,
        **_trained("reward"),
        **_keys(Change.taken, "reward_model.", "epochs max_steps final_lr_fraction warmup_steps validate_every"),
        "reward_model.batch_size": Change.refused,
        "reward_model.max_completions": Change.free,
        **_keys(Change.free, "reward_model.", "micro_batch_size micro_batch_tokens"),
    },
    "ppo": {
        **_COMMON,
        **_PRETRAINING,
        **_keys(Change.content, "data.", "prompts columns max_prompt_tokens max_per_user"),
        **_keys(Change.content, "data.", "deduplicate_prefix_tokens part part_shares"),
        **_trained("policy"),
        **_trained("value"),
        **_keys(Change.content, "reward.", "init_from function"),
        **_keys(Change.content, "rewards.NAME.", "init_from function"),
        **_keys(Change.taken, "rewards.NAME.", "weight timeout_score"),
        "reward.timeout_score": Change.taken,
        **_keys(Change.free, "reward.", "processes timeout_s"),
        **_keys(Change.free, "rewards.NAME.", "processes timeout_s"),
        # `best` compares scores of different steps: on the same prompts, sampled alike.
        "evaluation.prompts": Change.content,
        **_keys(Change.refused, "evaluation.", "samples temperature"),
        **_keys(Change.taken, "evaluation.", "every patience max_kl"),
        **_parallel("critic_parallel."),
        "critic_model": Change.content,
        **_keys(Change.free, "placement.", "kind critic_ranks portions"),
        **_keys(Change.free, "offload.", "reference reward optimizer"),
        **_keys(Change.free, "rollout.parallel.", "tensor pipeline last_stage_layers"),
        **_keys(Change.free, "rollout.", "batch_size cache_gb"),
        **_keys(Change.taken, "rollout.", f"{_SAMPLING} precision engine"),
        **_keys(
            Change.taken,
            "ppo.",
            "iterations samples_per_prompt minibatch_size inner_epochs clip value_clip gamma lam entropy_coef "
            "kl_target kl_horizon ptx_coef ptx_ratio "
            "ptx_gradient_ratio gradient_report_every "
            "warmup_iterations critic_warmup_iterations missing_stop_penalty whiten_advantages tax_every max_logprob_gap "
            "old_logprobs recheck_every",
        ),
        # The coefficient of adaptive control is in the checkpoint; an average or a value model is in it, or it is not.
        **_keys(Change.refused, "ppo.", "batch_size kl_control ema_decay advantages"),
        "ppo.kl_coef": Change.taken,
        **_keys(Change.free, "ppo.", "micro_batch_size micro_batch_tokens ptx_micro_batch_size ptx_micro_batch_tokens"),
    },
}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration, dotted, with its value as JSON has it."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result |= flat(value, f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                result |= flat(entry, f"{prefix}{field.name}.{name}.")
        else:
            result[f"{prefix}{field.name}"] = _plain(value)
    return result


def rule(stage: str, key: str) -> Change:
    """The key's own entry, or that of its group. A key without one is a mistake in this table."""
    parts = unnamed(key, TABLE[stage]).split(".")
    groups = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(TABLE[stage][group] for group in groups if group in TABLE[stage])


def settings(stage: str, config: Any) -> dict[str, Any]:
    """What a checkpoint keeps of its configuration: the keys whose change is applied or refused."""
    kept = (Change.taken, Change.refused)
    return {key: value for key, value in flat(config).items() if rule(stage, key) in kept}


def changes(stage: str, now: Mapping[str, Any], checkpoint: Path | None) -> list[str]:
    """`compare` with what the checkpoint to resume, if there is one, has kept."""
    if checkpoint is None:
        return []
    return compare(stage, sharded.read_meta(checkpoint)["state"].get("settings", {}), now, checkpoint)


def compare(stage: str, before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> list[str]:
    """What has changed and is applied, for the log.

    Raises:
        UserError: for a refused change, naming the key and both values.
    """
    changed = [
        key for key in now if key in before and before[key] != now[key] and not (key in FOLLOW and now[key] is None)
    ]
    adaptive = now.get("ppo.kl_control") == "adaptive"
    refused = [k for k in changed if rule(stage, k) is Change.refused or (k == "ppo.kl_coef" and adaptive)]
    if refused:
        named = "; ".join(f"{key}={_shown(now[key])}, was {_shown(before[key])}" for key in refused)
        raise UserError(
            f"{named}: {checkpoint} cannot be resumed with another value (docs/crashes.md has the table); resume with the "
            "former one, or start a new run from these weights with init_from"
        )
    return [f"from here on {key}={_shown(now[key])} (was {_shown(before[key])})" for key in changed]


def compare_content(what: str, keys: Iterable[str], before: Any, now: Any, checkpoint: Path) -> None:
    """Raise UserError where models or data differ from those that the checkpoint was made with."""
    if before != now:
        difference = ""
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            differing = [k for k in now if before.get(k) != now[k]]
            difference = " (" + "; ".join(f"{k} {_shown(now[k])}, was {_shown(before.get(k))}" for k in differing) + ")"
        raise UserError(
            f"{', '.join(keys)}: {checkpoint} was trained with other {what}{difference}; resume with the same, or start a new "
            "run from these weights with init_from"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
