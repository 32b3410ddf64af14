"""The package as a library: `import megatron_rlhf as mr; mr.run("ppo", config, reward=function)` (docs/library.md)."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from megatron_rlhf import cli
from megatron_rlhf.compose import as_yaml, compose_config
from megatron_rlhf.config.checking.ranges import check_ranges
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import nearest
from megatron_rlhf.config.stages import BaseConfig, EvaluateConfig, PPOConfig


def configure(stage: str, *overrides: str) -> Any:
    """A stage's configuration from `conf/` and overrides, as on the command line."""
    name = _stage(stage)
    return compose_config(name, cli.STAGES[name].schema, overrides)[0]


def run(stage: str, config: BaseConfig, reward: Callable | None = None, callbacks: Iterable[Any] = ()) -> Any:
    """Run one stage in this process, on the ranks that torchrun or srun has started, and return its trainer.

    Args:
        stage: sft, reward_model, ppo or evaluate.
        config: the stage's dataclass. It is not changed.
        reward: for PPO and evaluations, a score for each response: `function(prompts, responses, records) -> list of numbers`.
            It runs on one rank, in its process. Beside config.reward.init_from the two scores are added.
        callbacks: `Callback`s, or functions `f(trainer, metrics) -> more metrics or None` that are called after every step.

    Raises:
        UserError: a mistake in the configuration, in words for people.
    """
    name, callbacks = _stage(stage), list(callbacks)
    if not isinstance(config, cli.STAGES[name].schema):
        raise UserError(
            f"run({stage!r}, ...) takes a {cli.STAGES[name].schema.__name__}, and this is a {type(config).__name__}"
        )
    if callbacks and isinstance(config, EvaluateConfig):
        raise UserError(f"run({stage!r}, callbacks=...): an evaluation has no steps; leave them out")
    config = copy.deepcopy(config)
    if reward is not None:
        if not isinstance(config, PPOConfig | EvaluateConfig):
            raise UserError(f"run({stage!r}, reward=...): only ppo and evaluate score responses; leave it out")
        if not callable(reward):
            raise UserError(f"run({stage!r}, reward={reward!r}): not a function of (prompts, responses, records)")
        if config.reward.function is not None or config.rewards:
            raise UserError("run(..., reward=function) beside reward.function or rewards: give one of them")
        from megatron_rlhf.rewards import given

        config.reward.function = given.give(reward)
    check_ranges(config)
    return cli.run_config(name, config, as_yaml(config), callbacks)


def _stage(name: str) -> str:
    known = name.replace("-", "_")
    if known not in cli.STAGES:
        raise UserError(
            f"there is no stage {name}; did you mean {nearest(known, cli.STAGES) or ', '.join(cli.STAGES)}?"
        )
    return known
