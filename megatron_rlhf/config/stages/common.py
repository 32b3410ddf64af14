"""What every stage has."""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import NOT_GIVEN, Fp8Config, RunConfig, WatchdogConfig


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
