"""Supervised fine-tuning."""

from dataclasses import dataclass, field

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.data import DemonstrationDataConfig
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.training import OptimizerConfig, RoleConfig, SamplingConfig, Selection, TrainedRoleConfig


@dataclass(kw_only=True)
class SFTAlgorithmConfig:
    """Supervised fine-tuning (Ouyang et al. 2022, appendix C.1)."""

    epochs: int = 16
    """Passes over the demonstrations."""
    max_steps: int | None = None
    """Updates, instead of epochs; needed when pretraining_mix = 1."""
    batch_size: int = 32
    """Sequences per update, over all ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass, grouped by length; 4 if neither this nor micro_batch_tokens is given. Both change
    speed, memory and what dropout draws, but no other number."""
    micro_batch_tokens: int | None = None
    """Instead of micro_batch_size: tokens per forward pass, packed without padding."""
    dropout: float = 0.2
    """Residual dropout, which acts on embeddings as well, as in GPT-2."""
    final_lr_fraction: float = 0.1
    """Cosine decay to this share of the peak."""
    warmup_steps: int = 0
    """Linear warmup before the cosine."""
    select_by: Selection = Selection.validation_loss
    """Which epoch's checkpoint is named `best`: the lowest validation loss or the highest mean reward."""
    selection_samples: int = 64
    """Responses sampled for select_by=reward_model."""
    logged_samples: int = 8
    """Responses that are sampled, and written to samples.jsonl, at the end of each epoch, to the first prompts of
    data.validation, else of data.demonstrations; 0 for none. Where a reward model judges an epoch they are the first of
    those that it judged. Layouts that cannot decode (virtual stages, context parallelism) have none."""

    @property
    def micro_batch(self) -> Budget:
        return Budget.given(self.micro_batch_size, self.micro_batch_tokens, 4)


@dataclass(kw_only=True)
class SFTConfig(BaseConfig):
    """`megatron-rlhf sft`."""

    trained_roles = ("policy",)

    data: DemonstrationDataConfig
    """Demonstrations, tokenizer, pretraining mix."""
    policy: TrainedRoleConfig = field(default_factory=lambda: TrainedRoleConfig(optimizer=OptimizerConfig(lr=9.65e-6)))
    """The model that is tuned."""
    reward: RoleConfig = field(default_factory=RoleConfig)
    """Reward model for select_by=reward_model."""
    sft: SFTAlgorithmConfig = field(default_factory=SFTAlgorithmConfig)
    """Epochs, batch, schedule."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling for select_by=reward_model."""
