"""Every number of every schema rejects nonsense when a configuration is composed."""

import copy
import functools
import math
import typing
from typing import Any

import pytest

from megatron_rlhf.cli import STAGES
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.checking.ranges import RANGES, check_ranges
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import Key, keys
from megatron_rlhf.config.rewards import WeightedRewardConfig

SCHEMAS = {name: stage.schema for name, stage in STAGES.items()} | {"plan": PlanConfig}
START = {name: ["model=tiny"] for name in STAGES} | {"ppo": ["model=tiny", "model@critic_model=tiny"], "plan": []}
# Last words of the keys for which 0 has a meaning: off, none, greedy, all.
ZERO_MEANS_SOMETHING = set(
    """seed every logged_samples save_every keep_last keep_every timeout_s gate_every position_offset held_out pretraining_mix
    betas weight_decay clip_norm dropout final_lr_fraction warmup_steps temperature top_k validation_fraction critic_ranks gamma
    lam task_shots entropy_coef kl_coef ptx_coef warmup_iterations critic_warmup_iterations ema_decay missing_stop_penalty
    tax_every gradient_report_every
    reserved_gib
    node_latency_us network_latency_us layer_launch_us process_gib price_per_gpu_hour""".split()
)
NEGATIVE_MEANS_SOMETHING = {"weight", "timeout_score"}
"""A penalty."""
SHARES = set(
    """held_out pretraining_mix betas dropout final_lr_fraction top_p validation_fraction gamma lam ema_decay
    rope_fraction matmul_efficiency attention_efficiency memory_efficiency link_efficiency""".split()
)


def numbers() -> list[tuple[str, str, Key, type]]:
    """Stage, path, key and kind of every number."""
    found = []
    for stage, schema in SCHEMAS.items():
        for path, key in keys(schema).items():
            kinds = {typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind for kind in key.types}
            found += [(stage, path, key, kind) for kind in (int, float) if kind in kinds]
    return found


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    """A configuration of each stage that all ranges accept."""
    return {name: compose_config(name, schema, START[name], missing="-")[0] for name, schema in SCHEMAS.items()}


def below(config: Any, name: str) -> Any:
    """What a key is in; an entry with a name of the user's is made."""
    if isinstance(config, dict):
        return config.setdefault(name, WeightedRewardConfig())
    return getattr(config, name)


def refused(config: Any, path: str, key: Key, value: float) -> str:
    """The message for a value; of several numbers the last one is wrong."""
    *parents, name = path.split(".")
    config = copy.deepcopy(config)
    count = next((len(typing.get_args(kind)) for kind in key.types if typing.get_origin(kind) is tuple), 1)
    setattr(functools.reduce(below, parents, config), name, value if count == 1 else (*[0.9] * (count - 1), value))
    with pytest.raises(UserError) as caught:
        check_ranges(config)
    return str(caught.value)


def test_there_are_numbers_everywhere():
    assert {stage for stage, *_ in numbers()} == set(SCHEMAS)
    assert len({path for _, path, *_ in numbers()}) > 120


@pytest.mark.parametrize(
    ("stage", "path", "key", "kind"), numbers(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_number_refuses_nonsense(configs, stage, path, key, kind):
    name = path.rpartition(".")[2]
    nonsense: list[float] = [] if name in NEGATIVE_MEANS_SOMETHING else [-1]
    nonsense += [math.nan, math.inf, -math.inf] if kind is float else [3_000_000_000]
    nonsense += [-1e-9] if kind is float and name not in NEGATIVE_MEANS_SOMETHING else []
    nonsense += [] if name in ZERO_MEANS_SOMETHING | NEGATIVE_MEANS_SOMETHING else [0]
    nonsense += [1.5] if name in SHARES else []
    for value in nonsense:
        message = refused(configs[stage], path, key, value)
        assert message.startswith(path) and "must be" in message, message


def test_composing_refuses_them():
    with pytest.raises(UserError, match=r"sft\.dropout=nan must be a number, at least 0 and less than 1"):
        compose_config("sft", SCHEMAS["sft"], ["sft.dropout=nan"], missing="-")
    with pytest.raises(UserError, match=r"policy\.optimizer\.betas=1\.5 must be"):
        compose_config("ppo", SCHEMAS["ppo"], ["policy.optimizer.betas=[0.9,1.5]"], missing="-")
    with pytest.raises(UserError, match=r"rewards\.a\.weight=nan must be a number$"):
        compose_config("ppo", SCHEMAS["ppo"], ["rewards.a.weight=nan"], missing="-")


@pytest.mark.parametrize("given", ["policy.optimizer.betas=[0.9]", "data.part_shares=[0.8,0.1,0.05,0.05]"])
def test_several_numbers_are_as_many_as_their_key_has(given):
    with pytest.raises(UserError, match=rf"{given.partition('=')[0]}=.* has \d numbers, and must have \d"):
        compose_config("ppo", SCHEMAS["ppo"], [given], missing="-")


def test_the_table_names_only_fields_that_are_there():
    for schema, ranges in RANGES.items():
        assert set(ranges) <= {path for path in keys(schema) if "." not in path}, schema


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match=r"data\.tokenizer= is empty"):
        compose_config("sft", SCHEMAS["sft"], ["data.tokenizer="], missing="-")
