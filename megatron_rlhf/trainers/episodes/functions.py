"""The functions of a run's reward: found, recorded for a resume, started, and tried out before any model is built."""

import json
from collections.abc import Iterable, Iterator, Sequence

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.rewards import NamedReward, named_rewards
from megatron_rlhf.config.stages import EvaluateConfig, PPOConfig
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rewards import functions
from megatron_rlhf.rewards.processes import Answers
from megatron_rlhf.rewards.reward import Reward, launch_functions
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.setup import parts

TRIED = 2
"""Prompts that functions score before the run, each with an empty response, which a policy may well give."""


def find_functions(
    config: PPOConfig | EvaluateConfig,
    layout: ParallelLayout,
    prompts: Sequence[Prompt] | Examples[Prompt],
    session: Session,
) -> Reward:
    """The reward without its models, which the caller builds. Collective over the world.

    Raises:
        UserError: a function cannot be found, fails on the first prompts, or is not the one that the run began with.
    """
    named = named_rewards(config.reward, config.rewards)
    session.require_same("rewards", ["reward", "rewards"], [part.name for part in named])
    asked = [part for part in named if part.is_function]
    for part in asked:
        session.require_same(f"reward function {part.name}", [f"{part.key}.function"], _fingerprint(part))
    if asked:
        items = prompts.items if isinstance(prompts, Examples) else prompts
        parts.keep_data(session, "prompts' other columns", ["data.prompts"], items, _columns)
    reward = Reward(layout, {part.name: part.weight for part in named}, {}, launch_functions(layout, asked))
    first = [prompts[i] for i in range(min(TRIED, len(prompts)))]
    reward.try_functions(
        lambda: Answers(
            [prompt.text for prompt in first],
            [""] * len(first),
            [dict(prompt.record) for prompt in first],
            [prompt.id for prompt in first],
        )
    )
    return reward


def _fingerprint(part: NamedReward) -> dict[str, str]:
    try:
        return functions.fingerprint(str(part.config.function))
    except functions.Mistake as mistake:
        raise UserError(f"{part.key}.function={part.config.function} {mistake}") from mistake


def _columns(prompts: Iterable[Prompt]) -> Iterator[list[int]]:
    return (list(json.dumps(prompt.record, sort_keys=True, default=str).encode()) for prompt in prompts)
