"""The reward model."""

from dataclasses import dataclass, field

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.data import ComparisonDataConfig
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.training import OptimizerConfig, TrainedRoleConfig


@dataclass(kw_only=True)
class RewardAlgorithmConfig:
    """Reward model (Ouyang et al. 2022, section 3.5 and appendix C.2)."""

    epochs: int = 1
    """Passes over the comparisons; more overfits."""
    max_steps: int | None = None
    """Updates, instead of epochs."""
    batch_size: int = 64
    """Prompts per update, each with all its completions, whether ranked in one record or in several."""
    micro_batch_size: int | None = None
    """Prompts per forward pass, each with all its completions, which share one pass over the prompt; 1 if neither this
    nor micro_batch_tokens is given. Both change speed and memory, never the numbers."""
    micro_batch_tokens: int | None = None
    """Instead of micro_batch_size: tokens per forward pass, a prompt counted once for all its completions."""
    max_completions: int = 16
    """Completions of one prompt in a forward pass. One with more (many records), or with more than micro_batch_tokens,
    is scored first, then trained in parts: this costs one more forward pass and gives the same numbers."""
    final_lr_fraction: float = 0.1
    """Cosine decay to this share of the peak."""
    warmup_steps: int = 0
    """Linear warmup before the cosine."""
    validate_every: int = 50
    """Steps between validations; one is always made at the end."""

    @property
    def micro_batch(self) -> Budget:
        return Budget.given(self.micro_batch_size, self.micro_batch_tokens, 1)


@dataclass(kw_only=True)
class RewardModelConfig(BaseConfig):
    """`megatron-rlhf reward-model`."""

    trained_roles = ("reward",)

    data: ComparisonDataConfig
    """Comparisons and tokenizer."""
    reward: TrainedRoleConfig = field(default_factory=lambda: TrainedRoleConfig(optimizer=OptimizerConfig(lr=9e-6)))
    """The model that is trained; a language model given as init_from loses its unembedding to a new scalar head."""
    reward_model: RewardAlgorithmConfig = field(default_factory=RewardAlgorithmConfig)
    """Epochs, batch, schedule."""
