"""Which numbers each key accepts: others are refused before anything is built."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin

from megatron_rlhf.config import cluster, data, lora, model, placement, rewards, rollout, training
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import evaluate, held_out, ppo, reward_model, sft

LARGEST_WHOLE = 2**31 - 1
"""Tokens, seeds and steps are kept in 32 bits somewhere."""


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (isinstance(value, float) or value <= LARGEST_WHOLE)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def refusal(self, value: float) -> str | None:
        """What is wrong with a value, as 'must be at least 1'; None when nothing is."""
        if self.holds(value):
            return None
        if isinstance(value, int) and value > LARGEST_WHOLE and self.most is None:
            return f"must be at most {LARGEST_WHOLE}"
        words = [str(self)] if str(self) else []
        return "must be " + ", ".join(words if math.isfinite(value) else ["a number", *words])

    def __str__(self) -> str:
        bounds = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {bound:.9g}" for word, bound in bounds.items() if bound is not None)


ANY = Range()
COUNT = Range(least=1)
WIDTH = Range(least=1, most=2**20)
"""Far above any model: a number beyond is a slip, which would otherwise end in hours or in missing memory."""
NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(above=0)
SECONDS = Range(above=0, most=10**8)
"""Three years; what waits for longer is a slip, and beyond what timers can count."""
SHARE = Range(least=0, most=1)
PROPER_SHARE = Range(least=0, below=1)
"""All of it would leave nothing."""
SOME_SHARE = Range(above=0, most=1)
"""None of it would leave nothing."""

# A number that is not in this table must not be negative.
RANGES: Mapping[type, Mapping[str, Range]] = {
    training.RunConfig: {"stop_at_step": COUNT, "max_skipped_steps": COUNT, "rendezvous_timeout_s": SECONDS},
    training.WatchdogConfig: {"timeout_s": Range(least=0, most=SECONDS.most)},
    training.OptimizerConfig: {"lr": POSITIVE, "betas": PROPER_SHARE, "epsilon": POSITIVE},
    placement.PlacementConfig: {"portions": COUNT},
    lora.LoraConfig: {"rank": COUNT, "alpha": POSITIVE, "dropout": PROPER_SHARE},
    training.Fp8Config: {"gate_max_gap": POSITIVE, "gate_samples": COUNT},
    training.SamplingConfig: {
        "top_p": SOME_SHARE,
        "repetition_penalty": POSITIVE,
        "beams": COUNT,
        "max_response_tokens": COUNT,
        "min_response_tokens": COUNT,
        "batch_size": COUNT,
    },
    rollout.RolloutConfig: {"cache_gb": POSITIVE},
    model.ModelConfig: {
        "num_layers": Range(least=1, most=10_000),
        **dict.fromkeys(("hidden_size", "num_attention_heads", "num_query_groups", "head_dim"), WIDTH),
        **dict.fromkeys(("ffn_hidden_size", "vocab_size"), Range(least=1, most=2**24)),
        "max_sequence_length": COUNT,
        **dict.fromkeys(("rope_base", "rope_scaling_factor", "rope_low_frequency", "rope_high_frequency"), POSITIVE),
        **dict.fromkeys(("norm_epsilon", "init_std"), POSITIVE),
        "rope_fraction": SOME_SHARE,
        "rope_original_length": COUNT,
        "vocab_multiple": COUNT,
    },
    model.ParallelConfig: dict.fromkeys(
        ("tensor", "pipeline", "virtual_stages", "last_stage_layers", "context", "expert"), COUNT
    ),
    placement.GenerationLayoutConfig: dict.fromkeys(("tensor", "pipeline", "last_stage_layers"), COUNT),
    data.PretrainingDataConfig: {"sequence_length": COUNT, "held_out": PROPER_SHARE, "held_out_samples": COUNT},
    data.DemonstrationDataConfig: {
        "max_prompt_tokens": COUNT,
        "max_response_tokens": COUNT,
        "pretraining_mix": SHARE,
    },
    data.ComparisonDataConfig: {
        "max_prompt_tokens": COUNT,
        "max_response_tokens": COUNT,
        "validation_fraction": PROPER_SHARE,
    },
    data.PromptRulesConfig: {
        **dict.fromkeys(("max_prompt_tokens", "max_per_user", "deduplicate_prefix_tokens"), COUNT),
        "part_shares": POSITIVE,
    },
    sft.SFTAlgorithmConfig: {
        **dict.fromkeys(
            ("epochs", "max_steps", "batch_size", "micro_batch_size", "micro_batch_tokens", "selection_samples"), COUNT
        ),
        "dropout": PROPER_SHARE,
        "final_lr_fraction": SHARE,
    },
    reward_model.RewardAlgorithmConfig: {
        **dict.fromkeys(("epochs", "max_steps", "batch_size", "micro_batch_size", "micro_batch_tokens"), COUNT),
        **dict.fromkeys(("max_completions", "validate_every"), COUNT),
        "final_lr_fraction": SHARE,
    },
    ppo.PPOAlgorithmConfig: {
        **dict.fromkeys(
            ("iterations", "batch_size", "minibatch_size", "inner_epochs", "micro_batch_size", "micro_batch_tokens"),
            COUNT,
        ),
        **dict.fromkeys(
            (
                *("samples_per_prompt", "kl_horizon", "recheck_every"),
                *("ptx_ratio", "ptx_micro_batch_size", "ptx_micro_batch_tokens"),
            ),
            COUNT,
        ),
        **dict.fromkeys(("clip", "value_clip", "kl_target", "ptx_gradient_ratio", "max_logprob_gap"), POSITIVE),
        **dict.fromkeys(("gamma", "lam"), SHARE),
        "ema_decay": PROPER_SHARE,
    },
    evaluate.EvaluateAlgorithmConfig: dict.fromkeys(("samples", "samples_per_prompt", "task_limit"), COUNT),
    held_out.HeldOutConfig: {"samples": COUNT, "patience": COUNT, "max_kl": POSITIVE},
    rewards.RewardConfig: {"processes": COUNT, "timeout_s": SECONDS, "timeout_score": ANY},
    rewards.WeightedRewardConfig: {"weight": ANY},
    cluster.ClusterConfig: {
        **dict.fromkeys(("nodes", "gpus_per_node"), COUNT),
        **dict.fromkeys(("memory_gib", "bf16_tflops", "fp32_tflops", "fp8_tflops"), POSITIVE),
        **dict.fromkeys(("memory_gb_per_s", "node_gb_per_s", "network_gb_per_s"), POSITIVE),
        **dict.fromkeys(("matmul_efficiency", "attention_efficiency"), SOME_SHARE),
        **dict.fromkeys(("memory_efficiency", "link_efficiency"), SOME_SHARE),
        **dict.fromkeys(("host_memory_gib", "host_gb_per_s", "storage_gb_per_s", "gpu_hours_per_failure"), POSITIVE),
    },
    cluster.WorkloadConfig: {
        **dict.fromkeys(("demonstrations", "rankings", "prompt_tokens", "response_tokens"), COUNT),
        **dict.fromkeys(("completions", "max_completions"), Range(least=2)),
    },
}


def range_of(schema: type, name: str) -> Range:
    """The numbers that a field of a schema accepts; a schema inherits its parents' ranges."""
    return next((RANGES[base][name] for base in schema.__mro__ if name in RANGES.get(base, {})), NOT_NEGATIVE)


def check_ranges(config: Any) -> None:
    """Raise UserError for the first number outside its range, an empty text, and a list that is not as long as its key's."""
    for path, value, allowed in _values(config):
        if isinstance(value, str):
            if not value:
                raise UserError(f"{path}= is empty: give a text, or leave the key out")
        elif refusal := allowed.refusal(value):
            raise UserError(f"{path}={value} {refusal}")


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Range]]:
    for field in fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if get_origin(field.type) is tuple and len(value) != (count := len(get_args(field.type))):
            raise UserError(f"{path}={list(value)} has {len(value)} numbers, and must have {count}")
        if is_dataclass(value):
            yield from _values(value, f"{path}.")
        for name, entry in value.items() if isinstance(value, dict) else ():
            if is_dataclass(entry):
                yield from _values(entry, f"{path}.{name}.")
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str | int | float) and not isinstance(item, bool):
                yield path, item, range_of(type(config), field.name)
