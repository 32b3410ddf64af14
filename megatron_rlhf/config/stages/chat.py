"""A conversation with a model in the terminal."""

from dataclasses import dataclass, field

from megatron_rlhf.config.data import TokenizerConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.training import RoleConfig, SamplingConfig


@dataclass(kw_only=True)
class ChatSettings:
    """What is said beside the turns."""

    system: str | None = None
    """The system's turn, before the first of yours."""
    few_shot: str | None = None
    """A text file put before your first turn (the paper's few-shot baseline)."""
    best_of: int = 1
    """Answers sampled for each turn, of which the one that the reward model scores highest is given."""


@dataclass(kw_only=True)
class ChatConfig(BaseConfig):
    """`megatron-rlhf chat`: talk with a model. Commands: /model a|b|ab, /best N, /seed N, /undo, /reset, /save FILE, /quit."""

    data: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer, chat template, what ends an answer."""
    policy: RoleConfig = field(default_factory=RoleConfig)
    """The model that answers."""
    other: RoleConfig = field(default_factory=RoleConfig)
    """A second one, `/model b`, or both side by side, `/model ab`."""
    reward: RoleConfig = field(default_factory=RoleConfig)
    """Reward model, whose score is shown beside each answer."""
    critic_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the reward model."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are sampled; temperature=0 is greedy."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """System's turn, few-shot prefix, best of n."""
