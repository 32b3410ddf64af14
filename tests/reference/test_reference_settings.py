"""Each setting of a stage either differs from its default in the reference runs, or cannot change a figure there."""

import dataclasses
from enum import Enum
from pathlib import Path

import pytest
from reference import settings
from reference.world import World

from megatron_rlhf.config.stages import PPOConfig, RewardModelConfig, SFTConfig

# Groups or keys that change no figure: tests/distributed, tests/checkpoint and others show this for most of them.
NO_FIGURE = (
    *("run", "watchdog", "parallel", "critic_parallel", "placement", "offload", "rollout.parallel"),
    *("ppo.max_logprob_gap", "data.allow_other_tokenizer"),
    # Of which columns, through which template an example is made: tests/data, tests/end_to_end/test_conversations.py.
    *("data.chat_template", "data.format", "data.chat", "data.assistant_turns", "data.pretraining.columns"),
    *("data.columns.messages", "data.demonstration_columns.messages"),
    *("sft.logged_samples", "evaluation"),
    # Against transformers: tests/rollout/test_sampling.py, test_generate.py.
    *("sampling.repetition_penalty", "rollout.repetition_penalty", "sampling.beams", "rollout.beams"),
    # The same texts by another engine: tests/rollout/test_megatron_engine.py.
    *("rollout.engine", "rollout.cache_gb"),
    # Against peft: tests/conversion/test_peft.py; what is frozen: tests/trainers/test_partial_training.py.
    *(f"{role}.{key}" for role in ("policy", "reward", "value") for key in ("lora", "trainable")),
    # Alternatives to sizes in sequences: tests/distributed and tests/trainers.
    *(
        "sft.micro_batch_tokens",
        "reward_model.micro_batch_tokens",
        "ppo.micro_batch_tokens",
        "ppo.ptx_micro_batch_tokens",
    ),
    # Lower precision, and shapes for when no starting point provides one.
    *("precision", "fp8", "sampling.precision", "rollout.precision", "model", "critic_model"),
)
# Covered by another case of the same test.
ELSEWHERE = {
    SFTConfig: ("sft.max_steps", "data.pretraining.held_out_samples"),
    # Columns of comparisons that come in several forms: tests/data.
    RewardModelConfig: ("data.validation", "data.stop", "data.columns", "reward_model.max_steps"),
    # Which prompts remain: tests/data, tests/trainers/setup/test_prompts_of_a_part.py.
    PPOConfig: (
        # tests/trainers/episodes/test_ppo_rewards.py
        *("reward.function", "reward.processes", "reward.timeout_s", "reward.timeout_score", "rewards"),
        "ppo.advantages",
        "ppo.samples_per_prompt",
        "data.deduplicate_prefix_tokens",
        "data.part",
        "data.part_shares",
    ),
}


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Defaults by their full names."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value.value if isinstance(value, Enum) else value
    return found


@pytest.mark.parametrize(
    ("schema", "asked"),
    [(SFTConfig, settings.sft), (RewardModelConfig, settings.reward_model), (PPOConfig, settings.ppo)],
    ids=["sft", "reward_model", "ppo"],
)
def test_no_setting_is_at_its_default(schema, asked):
    given = asked(World(Path()), Path())
    annotations = schema.__annotations__
    data, run = (
        annotations["data"],
        next(c.__annotations__["run"] for c in schema.__mro__ if "run" in c.__annotations__),
    )
    names = {field.name for field in dataclasses.fields(data)}
    required = {name: "" for name in ("comparisons", "prompts") if name in names}
    defaults = flat(schema(run=run(dir=""), data=data(**required)))
    assert given.keys() <= defaults.keys()
    left = [
        name
        for name, default in defaults.items()
        if (name not in given or given[name] == default)
        and not any(name == group or name.startswith(f"{group}.") for group in (*NO_FIGURE, *ELSEWHERE[schema]))
    ]
    assert not left, "move these from their default in settings.py, and recompute what they do"
