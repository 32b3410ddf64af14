"""What gives responses their score: `reward.*`, or `rewards.NAME.*` for a weighted sum of several."""

from dataclasses import dataclass

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import RoleConfig

RESERVED = (
    *("score", "total", "response_length"),
    *("step", "prompt", "prompt_id", "response", "kl", "held_out", "stopped", "source", "record", "gold"),
)
"""Of the sum: `reward/score_mean`, `reward/total_mean`; another metric of evaluations; other columns of samples."""


@dataclass(kw_only=True)
class RewardConfig(RoleConfig):
    """A reward model, a Python function, or both, whose scores are then added."""

    function: str | None = None
    """path/to/file.py:NAME or MODULE:NAME of `def NAME(prompts: list[str], responses: list[str], records: list[dict]) ->
    list[float]`: a score for each response. `records` have the other columns of the prompts' data. Ready to use are
    megatron_rlhf.rewards.exact_answer:score, format_rule:score and unit_tests:score there (docs/rewards.md)."""
    processes: int = 1
    """Processes that share each batch of the function's, beside the first rank that holds reward and value model. With 1, a
    call has the whole batch."""
    timeout_s: float = 60.0
    """Seconds within which the function must be imported, and must return the scores of a batch; else the run ends."""
    timeout_score: float | None = None
    """What a response scores for which the function does not return within timeout_s. The function is then called with one
    response at a time, and starts anew after each that it did not return for. Not given: the run ends."""


@dataclass(kw_only=True)
class WeightedRewardConfig(RewardConfig):
    """One of several rewards: either a reward model or a function."""

    weight: float = 1.0
    """Of its score in the sum; a penalty has a negative one."""


@dataclass(frozen=True)
class NamedReward:
    """A part of a run's reward."""

    name: str
    key: str
    """`reward`, or `rewards.NAME`."""
    weight: float
    config: RewardConfig
    is_function: bool


def named_rewards(reward: RewardConfig, rewards: dict[str, WeightedRewardConfig]) -> list[NamedReward]:
    """All parts of a run's reward: of `reward` they are called model and function."""
    found = [
        NamedReward(name, f"rewards.{name}", part.weight, part, part.function is not None)
        for name, part in rewards.items()
    ]
    if reward.init_from is not None:
        found.append(NamedReward("model", "reward", 1.0, reward, False))
    if reward.function is not None:
        found.append(NamedReward("function", "reward", 1.0, reward, True))
    return found


def check_rewards(reward: RewardConfig, rewards: dict[str, WeightedRewardConfig]) -> None:
    """Each part of a reward is one thing with a name."""
    if rewards and (reward.init_from or reward.function):
        given = f"reward.init_from={reward.init_from}" if reward.init_from else f"reward.function={reward.function}"
        raise UserError(f"{given} beside rewards ({', '.join(rewards)}): make it one of them, as rewards.NAME")
    for key, one in {"reward": reward, **{f"rewards.{name}": part for name, part in rewards.items()}}.items():
        if one.timeout_score is not None and one.function is None:
            raise UserError(f"{key}.timeout_score={one.timeout_score:g} is for a function: give {key}.function too")
    for name, part in rewards.items():
        if not name.isidentifier() or name in RESERVED:
            raise UserError(f"rewards.{name}: a name has letters, digits and _, and is none of {', '.join(RESERVED)}")
        if (part.init_from is None) == (part.function is None):
            raise UserError(
                f"rewards.{name}: give either init_from or function" + (", not both" if part.function else "")
            )
