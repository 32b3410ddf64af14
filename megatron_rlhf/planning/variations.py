"""A run with other settings: what frees memory, in order of what it costs, and what makes sampling faster.

A variation is overrides as one would write them, so that an answer can be pasted behind the command.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Recompute
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.stages import plan_stage

Overrides = Mapping[str, Any]
SLOTS = (16, 32, 64, 128, 256)


def varied(config: Any, overrides: Overrides) -> Any:
    """A copy of a configuration with other values at dotted keys."""
    for path, value in overrides.items():
        name, _, rest = path.partition(".")
        child = getattr(config, name)
        assert is_dataclass(child) or not rest, path
        config = replace(config, **{name: varied(child, {rest: value}) if rest else value})
    return config


def plan_if_possible(config: BaseConfig, plan: PlanConfig) -> Plan | None:
    """None for a layout that the GPUs or the model cannot have."""
    try:
        return plan_stage(config, plan)
    except UserError:
        return None


def changes(before: Any, after: Any, prefix: str = "") -> dict[str, Any]:
    """The overrides that make one configuration from another of the same stage."""
    found: dict[str, Any] = {}
    for field in fields(before):
        old, new, path = getattr(before, field.name), getattr(after, field.name), f"{prefix}{field.name}"
        if is_dataclass(old) and is_dataclass(new):
            found |= changes(old, new, f"{path}.")
        elif old != new:
            found[path] = new
    return found


def micro_batch(config: BaseConfig, size: int) -> dict[str, Any]:
    """Overrides that set every micro batch to a number of sequences."""
    group = "reward_model" if isinstance(config, RewardModelConfig) else "sft"
    prefixes = [""]
    if isinstance(config, PPOConfig):
        group, prefixes = "ppo", ["", "ptx_"] if config.ppo.mixes_text else [""]
    sizes = {f"{group}.{prefix}micro_batch_size": size for prefix in prefixes}
    return sizes | {f"{group}.{prefix}micro_batch_tokens": None for prefix in prefixes}


def remedies(config: BaseConfig) -> Iterator[dict[str, Any]]:
    """Single changes that free memory at the same layout; the first ones cost least."""
    if isinstance(config, PPOConfig):
        yield from ({"rollout.batch_size": size} for size in (16, 4, 1) if size < config.rollout.batch_size)
    yield micro_batch(config, 1)
    yield sharded(config)
    yield from offloads(config)[1:]
    yield {"parallel.recompute": Recompute.full}


def sharded(config: BaseConfig) -> dict[str, Any]:
    """The distributed optimizer, and the sequence split where tensors are."""
    keys = ["parallel", "critic_parallel"] if isinstance(config, PPOConfig) else ["parallel"]
    found = {f"{key}.distributed_optimizer": True for key in keys}
    return found | {f"{key}.sequence": True for key in keys if getattr(config, key).tensor > 1}


def fewer_slots(config: BaseConfig) -> list[dict[str, Any]]:
    """Fewer sequences that are sampled at once."""
    if not isinstance(config, PPOConfig) or config.rollout.batch_size <= min(SLOTS):
        return [{}]
    return [{}, {"rollout.batch_size": min(SLOTS)}]


def faster_sampling(config: PPOConfig, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """Other numbers of slots, and a copy of the policy with fewer stages, each inside a node."""
    stages = config.parallel.pipeline
    tensors = sorted({config.parallel.tensor, gpus_per_node})
    copies: list[dict[str, Any]] = [{}]
    for pipeline in (1, 2, 4):
        if pipeline < stages and stages % pipeline == 0:
            copies += [{"rollout.parallel.pipeline": pipeline, "rollout.parallel.tensor": t} for t in tensors]
    for copy, slots in itertools.product(copies, (config.rollout.batch_size, *SLOTS)):
        yield copy if slots == config.rollout.batch_size else copy | {"rollout.batch_size": slots}


def offloads(config: BaseConfig) -> list[dict[str, Any]]:
    """What can rest in the host's memory: the frozen models first, which are read once an iteration."""
    if not isinstance(config, PPOConfig):
        return [{}]
    frozen = {"offload.reference": True, "offload.reward": True}
    return [{}, frozen, frozen | {"offload.optimizer": True}]
