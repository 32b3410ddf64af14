"""How far the policy has moved from its reference, and what a nat of that distance costs."""

import torch
from torch import Tensor

from megatron_rlhf.algorithms.masking import assert_same_shape

# Each takes the log-ratio, log pi - log pi_ref, of a token sampled from pi.
_ESTIMATORS = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
    "abs": lambda log_ratio: log_ratio.abs(),
}


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(pi || pi_ref) at each token from the one token that was sampled from pi.

        k1  = log pi - log pi_ref               unbiased, but of either sign
        k2  = k1^2 / 2                          biased, low variance
        k3  = pi_ref / pi - 1 + k1              unbiased, low variance, never negative
        abs = |k1|

    After Schulman 2020, "Approximating KL divergence". k1 is the penalty in InstructGPT's reward (arXiv 2203.02155,
    eq. 2); k3 is the one to report.

    Args:
      logprobs: [b, t] log-probability of the sampled token under the policy.
      ref_logprobs: [b, t] the same under the reference.
      estimator: "k1", "k2", "k3" or "abs".

    Returns:
      [b, t]; nothing is masked here.

    Raises:
      ValueError: the estimator is not one of the four.
    """
    assert_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if estimator not in _ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(_ESTIMATORS)}")
    return _ESTIMATORS[estimator](logprobs - ref_logprobs)


class FixedKLController:
    """Keeps the KL coefficient as it is: InstructGPT's choice."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, kl: float | Tensor, n: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        """Returns nothing to restore: the coefficient is the configuration's."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing."""


class AdaptiveKLController:
    """Steers the KL coefficient so that the measured KL approaches a target.

        coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)

    After Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Attributes:
      coef: the current coefficient.
      target: wanted KL, in the unit of the measured one (usually nats per sequence).
      horizon: sequences over which the coefficient changes by as much as the (clipped) relative error.
    """

    def __init__(self, coef: float, target: float, horizon: float):
        assert target > 0, f"target must be positive, got {target}"
        assert horizon > 0, f"horizon must be positive, got {horizon}"
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float | Tensor, n: int) -> None:
        """Takes in the mean KL of `n` new sequences."""
        # With the arguments in this order a NaN reaches the coefficient and is noticed; in the other it would become 0.2.
        error = max(min(float(kl) / self.target - 1, 0.2), -0.2)
        self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Returns what a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` returned; target and horizon stay the configuration's."""
        self.coef = state["coef"]
