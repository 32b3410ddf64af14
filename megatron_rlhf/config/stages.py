"""One schema per stage: fine-tuning, reward model, PPO, evaluation. Defaults are InstructGPT's where the paper states them."""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.data import (
    ComparisonDataConfig,
    DemonstrationDataConfig,
    EvaluationDataConfig,
    PromptDataConfig,
)
from megatron_rlhf.config.evaluation import EvaluateAlgorithmConfig
from megatron_rlhf.config.held_out import HeldOutConfig
from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.placement import GenerationLayoutConfig, PlacementConfig
from megatron_rlhf.config.ppo import PPOAlgorithmConfig
from megatron_rlhf.config.rewards import NamedReward, RewardConfig, WeightedRewardConfig, named_rewards
from megatron_rlhf.config.training import (
    NOT_GIVEN,
    Fp8Config,
    OffloadConfig,
    OptimizerConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    Selection,
    TrainedRoleConfig,
    WatchdogConfig,
)


@dataclass(kw_only=True)
class BaseConfig:
    """What every stage has."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir=NOT_GIVEN))
    """Run folder, seed, checkpoints."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """What to do about ranks that hang or die."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the model being trained (PPO: of policy and reference)."""
    precision: Precision = Precision.fp32
    """fp32, bf16, fp16 or fp8_hybrid (Transformer Engine)."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """Scales and safeguards of precision=fp8_hybrid."""
    model: ModelConfig | None = None
    """Shape for training from scratch; not needed when `init_from` has one, and must agree with it when both are given."""

    trained_roles: ClassVar[tuple[str, ...]] = ()

    def precision_of(self, role: str) -> Precision:
        """A role's own precision. fp8 is for roles that train: the scales of a frozen model would never be determined.

        The delayed recipe reduces the scales of all models of a process at the end of every forward pass, which
        deadlocks if two models are split differently over pipeline stages: then only the policy uses it.
        """
        if self.precision is not Precision.fp8_hybrid:
            return self.precision
        mine = role in self.trained_roles and not (role == "value" and self.fp8.recipe is Fp8Recipe.delayed)
        return Precision.fp8_hybrid if mine else Precision.bf16


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
    """`examples/train_sft.py`."""

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
    """`examples/train_reward_model.py`."""

    trained_roles = ("reward",)

    data: ComparisonDataConfig
    """Comparisons and tokenizer."""
    reward: TrainedRoleConfig = field(default_factory=lambda: TrainedRoleConfig(optimizer=OptimizerConfig(lr=9e-6)))
    """The model that is trained; a language model given as init_from loses its unembedding to a new scalar head."""
    reward_model: RewardAlgorithmConfig = field(default_factory=RewardAlgorithmConfig)
    """Epochs, batch, schedule."""


@dataclass(kw_only=True)
class RolloutConfig(SamplingConfig):
    """How responses are sampled, and at what layout."""

    parallel: GenerationLayoutConfig = field(default_factory=GenerationLayoutConfig)
    """If given, the policy's weights are copied every iteration to a second copy at this layout, by Megatron-Core's
    resharding."""


@dataclass(kw_only=True)
class PPOConfig(BaseConfig):
    """`examples/train_ppo.py`."""

    trained_roles = ("policy", "value")

    data: PromptDataConfig
    """Prompts, tokenizer, pretraining text."""
    policy: TrainedRoleConfig = field(default_factory=lambda: TrainedRoleConfig(optimizer=OptimizerConfig(lr=9e-6)))
    """The model that learns to answer; its starting weights are the frozen reference."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The frozen reward model, or a function instead of it or beside it."""
    rewards: dict[str, WeightedRewardConfig] = field(default_factory=dict)
    """Instead of `reward`: several by name, whose weighted sum it is; `reward/NAME_mean` is the mean of each, without weight."""
    value: TrainedRoleConfig = field(default_factory=lambda: TrainedRoleConfig(optimizer=OptimizerConfig(lr=9e-6)))
    """The critic; starts from the (first) reward model, or from the policy where there is none, unless init_from names
    another: a language model gets a new scalar head."""
    critic_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of reward and value model."""
    critic_model: ModelConfig | None = None
    """Shape of reward and value model, checked against their checkpoint where it is given."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which ranks hold which roles."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    """What is kept in host memory while it is not used."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled."""
    ppo: PPOAlgorithmConfig = field(default_factory=PPOAlgorithmConfig)
    """Batches, clipping, KL, pretraining mix."""
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Held-out prompts during the run, the best policy, and when to stop."""

    @property
    def reward_models(self) -> list[NamedReward]:
        """The parts of the reward that are models."""
        return [part for part in named_rewards(self.reward, self.rewards) if not part.is_function]


@dataclass(kw_only=True)
class EvaluateConfig(BaseConfig):
    """`examples/evaluate.py`: sample responses, score them, measure the loss on held-out text."""

    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    """Prompts, tokenizer, pretraining text for the held-out loss."""
    policy: RoleConfig = field(default_factory=RoleConfig)
    """The model that answers."""
    reward: RoleConfig = field(default_factory=RoleConfig)
    """Reward model, optional."""
    critic_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the reward model."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""
    evaluate: EvaluateAlgorithmConfig = field(default_factory=EvaluateAlgorithmConfig)
    """How many, which weights, what else to measure."""
