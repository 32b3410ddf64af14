"""PPO-ptx."""

from dataclasses import dataclass, field
from enum import Enum

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.data import PromptDataConfig
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.placement import PlacementConfig, PlacementKind
from megatron_rlhf.config.rewards import NamedReward, RewardConfig, WeightedRewardConfig, named_rewards
from megatron_rlhf.config.rollout import RolloutConfig
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.stages.held_out import HeldOutConfig
from megatron_rlhf.config.training import (
    AdvantageEstimator,
    KLControl,
    OffloadConfig,
    OptimizerConfig,
    TrainedRoleConfig,
)


class OldLogprobs(Enum):
    """Where the log-probabilities come from that an update's ratios, and the KL to the reference, start from."""

    recomputed = "recomputed"
    sampled = "sampled"


@dataclass(kw_only=True)
class PPOAlgorithmConfig:
    """PPO-ptx (Ouyang et al. 2022, section 3.5 and appendix C.4)."""

    iterations: int = 500
    """Rollouts; with batch_size 512 the paper's 256k episodes."""
    batch_size: int = 512
    """Episodes per iteration, those of one prompt included."""
    samples_per_prompt: int = 1
    """Responses to each prompt of an iteration: batch_size / samples_per_prompt prompts are answered."""
    advantages: AdvantageEstimator = AdvantageEstimator.gae
    """gae (InstructGPT): by a value model. Without one, from several samples of a prompt: rloo, grpo, reinforce_baseline.
    All estimate the same reward, KL penalty included; docs/rewards.md has the equations."""
    minibatch_size: int = 64
    """Episodes per update; must divide batch_size."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    micro_batch_size: int | None = None
    """Sequences per forward pass, grouped by length; 4 if neither this nor micro_batch_tokens is given. Both change
    speed and memory, never the numbers."""
    micro_batch_tokens: int | None = None
    """Instead of micro_batch_size: tokens per forward pass, packed without padding."""
    clip: float = 0.2
    """Policy ratio clipped to 1 +- this."""
    value_clip: float = 0.2
    """New values clipped to +- this around the old."""
    gamma: float = 1.0
    """Discount; the paper uses none."""
    lam: float = 0.95
    """GAE's lambda; the paper does not state it, 0.95 is the convention."""
    entropy_coef: float = 0.0
    """Weight of the policy's mean entropy per token, which is then raised: a bonus beside the clipped objective."""
    kl_coef: float = 0.02
    """Weight of the per-token KL penalty against the reference."""
    kl_control: KLControl = KLControl.fixed
    """fixed (InstructGPT) or adaptive (Ziegler et al. 2019)."""
    kl_target: float = 6.0
    """KL per sequence that adaptive control steers to, in nats."""
    kl_horizon: int = 10000
    """Episodes over which adaptive control reacts."""
    ptx_coef: float | int | str = 27.8
    """The paper's gamma: the weight of pretraining gradients; 0 is plain PPO; auto: set to reach ptx_gradient_ratio.
    Its unit, and what to look at first: docs/gamma.md."""
    ptx_gradient_ratio: float = 1.0
    """With ptx_coef=auto: the norm of the text's gradient, gamma included, over that of PPO's, to which gamma is steered."""
    ptx_ratio: int = 8
    """Pretraining examples for each episode."""
    ptx_micro_batch_size: int | None = None
    """Pretraining sequences per forward pass; 4 if neither this nor ptx_micro_batch_tokens is given."""
    ptx_micro_batch_tokens: int | None = None
    """Instead of ptx_micro_batch_size: tokens of pretraining text per forward pass."""
    warmup_iterations: int = 10
    """The policy's learning rate rises from one tenth of its peak over this many iterations, its first ones."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the value model learns; the policy's warmup and adaptive KL control begin after them."""
    ema_decay: float = 0.992
    """Decay of the exponential moving average of the policy's weights, per update; 0 keeps none."""
    missing_stop_penalty: float = 1.0
    """Subtracted from the score of a response that never stopped, in the reward model's units (log-odds); without it a
    policy learns to ramble on. `reward/score_mean` is the score without it, `reward/total_mean` with it. The paper does
    not state how it treats such responses."""
    whiten_advantages: bool | None = None
    """Normalise advantages to mean 0 and variance 1 over the whole rollout. Not given: as their papers do, true for gae and
    reinforce_baseline, false for rloo and grpo."""
    gradient_report_every: int = 10
    """Iterations between reports on the gradients of PPO and of the text (norms and cosine, at the iteration's first
    update); 0 for never. With ptx_coef=auto every iteration has one. Costs one more gradient buffer."""
    tax_every: int = 10
    """Iterations between measurements of the held-out pretraining loss (the alignment tax); 0 for never."""
    old_logprobs: OldLogprobs = OldLogprobs.recomputed
    """recomputed: the policy reads the whole rollout once more; sampled: as they were when the tokens were drawn, which
    saves that pass. In fp32 both are equal except for rounding; in bf16 the rounding of decoding enters the ratios."""
    recheck_every: int = 10
    """With old_logprobs=sampled: iterations between rollouts that are recomputed all the same, only to compare. The
    first update's ratios are compared in every iteration."""
    max_logprob_gap: float | None = None
    """Stop when sampled and recomputed log-probabilities, or the first update's ratios, differ by more than this: that
    would be a bug. Not given: 0.05 in fp32, 1 in fp16, 2 in bf16, 4 in fp8, which is more than rounding causes."""

    @property
    def micro_batch(self) -> Budget:
        return Budget.given(self.micro_batch_size, self.micro_batch_tokens, 4)

    def recomputes(self, iteration: int) -> bool:
        """The policy scores the rollout of this iteration, counted from 1."""
        return self.old_logprobs is OldLogprobs.recomputed or iteration % self.recheck_every == 0

    @property
    def ptx_micro_batch(self) -> Budget:
        return Budget.given(self.ptx_micro_batch_size, self.ptx_micro_batch_tokens, 4)

    @property
    def steers_text(self) -> bool:
        """The run determines gamma itself."""
        return self.ptx_coef == "auto"

    @property
    def mixes_text(self) -> bool:
        """There are pretraining gradients in addition to PPO's."""
        return self.steers_text or float(self.ptx_coef) > 0

    @property
    def reports_gradients(self) -> bool:
        """The two gradients are measured separately at some iterations."""
        return self.mixes_text and (self.steers_text or self.gradient_report_every > 0)

    @property
    def has_critic(self) -> bool:
        """Advantages come from a value model, which is trained too."""
        return self.advantages is AdvantageEstimator.gae

    @property
    def whitens(self) -> bool:
        """Advantages are normalised over the rollout."""
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return self.advantages in (AdvantageEstimator.gae, AdvantageEstimator.reinforce_baseline)


@dataclass(kw_only=True)
class PPOConfig(BaseConfig):
    """`megatron-rlhf ppo`."""

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
    def values_in_update(self) -> bool:
        """The value model scores a rollout in the forward pass of its first update, which reads all of it with the same weights.

        Not in fp8, where the scales of the two passes would differ.
        """
        return (
            self.ppo.has_critic
            and self.ppo.minibatch_size == self.ppo.batch_size
            and self.placement.kind is PlacementKind.colocated
            and self.precision is not Precision.fp8_hybrid
            and self.value.lora.dropout == 0
        )

    @property
    def reward_models(self) -> list[NamedReward]:
        """The parts of the reward that are models."""
        return [part for part in named_rewards(self.reward, self.rewards) if not part.is_function]
