"""A guard for fp8: now and then the policy's log-probabilities in fp8 are compared with its own in bf16."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.model import Fp8Recipe
from megatron_rlhf.config.training import Fp8Config
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.pipeline import forward_backward

log = logging.getLogger(__name__)

# Passes after which delayed scales have adapted to a model's initial weights and activations.
SETTLING_PASSES = 2


@dataclass
class Fp8Gate:
    """Compares on a fixed batch; falls back to bf16 once, permanently. Collective over the role's ranks."""

    config: Fp8Config
    role: Role
    batch: TokenBatch
    micro_batch_size: Budget | int
    temperature: float = 1.0
    fell_back_at: int | None = None
    """Step before which the policy switched to bf16."""

    @classmethod
    def over(
        cls,
        config: Fp8Config,
        role: Role,
        texts: Sequence[Sequence[int] | Tensor],
        micro_batch_size: Budget | int,
        temperature: float = 1.0,
    ) -> "Fp8Gate | None":
        """A gate for a role in fp8; None for any other. `texts` are token ids; the first few are compared."""
        if not role.in_fp8:
            return None
        chosen = [texts[i] for i in range(min(len(texts), config.gate_samples))]
        batch = TokenBatch.pack(chosen, [1] * len(chosen))
        return cls(config, role, batch, micro_batch_size, temperature)

    def check(self, step: int) -> dict[str, float]:
        """After `step` steps, compare if due. Returns metrics; `fp8/active`: whether the next step computes in fp8."""
        if self.fell_back_at is not None or self.config.gate_every == 0 or step % self.config.gate_every:
            return {"fp8/active": float(self.fell_back_at is None)}
        if step == 0 and self.config.recipe is Fp8Recipe.delayed:
            self._settle()
        mean, largest = self.gap()
        if not mean <= self.config.gate_max_gap:  # also if it is NaN
            self._fall_back(step)
            log.warning(
                "log-probabilities in fp8 differ from bf16 by %.3g nats a token (fp8.gate_max_gap=%g; at most %.3g) before "
                "step %d: the policy goes on in bf16",
                mean,
                self.config.gate_max_gap,
                largest,
                step + 1,
            )
        metrics = {"fp8/logprob_gap_mean": mean, "fp8/logprob_gap_max": largest}
        return {"fp8/active": float(self.fell_back_at is None), **metrics}

    def gap(self) -> tuple[float, float]:
        """Mean and largest |log p in fp8 - log p in bf16| over the batch's tokens; the same on every rank."""
        quantized_bs = self._logprobs()
        with self.role.without_fp8():
            exact_bs = self._logprobs()
        difference = (quantized_bs - exact_bs).abs()[self.batch.target_bs[:, 1:]]
        return float(difference.mean()), float(difference.max())

    def _logprobs(self) -> Tensor:
        return self.role.logprobs(self.batch.sequences, self.micro_batch_size, self.temperature)

    def _settle(self) -> None:
        """Delayed scales start at 1 and adapt to training passes: run the batch through, and discard its gradients."""
        for _ in range(SETTLING_PASSES):
            for chunk in self.role.chunks:
                chunk.train()
                chunk.zero_grad_buffer()  # type: ignore[operator]
            microbatches = language_model_microbatches(self.batch, self.role, self.micro_batch_size, "settling")
            forward_backward(self.role.chunks, microbatches, self.role.layout)

    def _fall_back(self, step: int) -> None:
        self.fell_back_at = step
        self.role.switch_fp8(on=False)

    def state_dict(self) -> dict[str, Any]:
        return {"fell_back_at": self.fell_back_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fell_back_at"] is not None:
            self._fall_back(state["fell_back_at"])
