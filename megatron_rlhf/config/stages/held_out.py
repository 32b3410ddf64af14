"""Prompts that PPO does not train on, answered now and then: `evaluation.*`."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class HeldOutConfig:
    """Always the same prompts, answered every n iterations: the best policy, and when to stop."""

    every: int = 0
    """Iterations between evaluations; there is one after the last iteration too. 0: never. Each saves the policy's weights as
    checkpoints/evaluation_N, and `best` points to those with the highest evaluation/score_mean."""
    prompts: str | None = None
    """Prompts to answer, as data.prompts; not given: those of data.prompts in the part `validation`, which needs
    data.part=train."""
    samples: int = 64
    """How many of them, the first ones."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy. The other settings of sampling are those of `rollout`."""
    patience: int | None = None
    """The run ends after this many evaluations in a row without a new best score."""
    max_kl: float | None = None
    """The run ends after an iteration whose kl/mean is above this, in nats a response; needs no evaluation."""

    @property
    def is_on(self) -> bool:
        """Held-out prompts are answered."""
        return self.every > 0
